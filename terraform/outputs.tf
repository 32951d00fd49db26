output "ssh" {
  description = "The command that logs in to each VM; null for a VM that does not exist."
  value = {
    for i, name in local.names :
    name => try("ssh -i ${var.ssh_private_key_file} ${local.linux_user}@${google_compute_instance.vm[i].network_interface[0].access_config[0].nat_ip}", null)
  }
}

output "one_of_several" {
  description = "The command that creates each VM without changing the others. With destroy instead of apply it removes the VM."
  depends_on  = [google_compute_instance.vm] # else -target leaves it out
  value = {
    for i, name in local.names :
    name => "terraform apply -lock=false -target='google_compute_instance.vm[${i}]'"
  }
}

output "run" {
  description = "The command to run on each VM; with cluster = true only on VM 0, which shares the job with the others."
  depends_on  = [google_compute_instance.vm] # else -target leaves it out
  value = {
    for i, name in local.names :
    name => join("", [
      "python3 train_segmentation_model_prediction_thresholds.py --gcp-bucket ${var.gcp_bucket}",
      " --dataset-directory <dataset_directory> --model-id <model_id>",
      " --optimizing-class-metric <optimizing_class_metric> --dataset-downsample-factor <dataset_downsample_factor>",
    ])
    if i == 0 || !var.cluster
  }
}
