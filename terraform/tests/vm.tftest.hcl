# Only plans, with a mock of Google Cloud: an apply would really run the provisioners.

mock_provider "google" {}

variables {
  project_name         = "damage-123456"
  user_name            = "jane"
  gcp_bucket           = "gs://damage-data/stacks"
  ssh_source_ranges    = ["203.0.113.7/32", "198.51.100.0/24"]
  ssh_private_key_file = "tests/key"
}

run "one_machine_by_default" {
  command = plan

  assert {
    condition     = google_compute_instance.vm[*].name == ["damage-123456-jane"]
    error_message = "Not one VM named <project_name>-<user_name>: ${jsonencode(google_compute_instance.vm[*].name)}"
  }
  assert {
    condition     = google_compute_instance.vm[0].zone == "us-central1-c" && google_compute_subnetwork.vm.region == "us-central1"
    error_message = "The subnetwork is not in the region of the VM's zone"
  }
  assert {
    condition     = google_compute_instance.vm[0].machine_type == "g2-standard-8" && length(google_compute_instance.vm[0].guest_accelerator) == 0
    error_message = "Not a machine type with one L4"
  }
  assert {
    condition = alltrue([
      for disk in google_compute_instance.vm[0].boot_disk[0].initialize_params :
      disk.size == var.disk_gb && disk.image == "projects/deeplearning-platform-release/global/images/family/common-cu129-ubuntu-2404-nvidia-580"
    ])
    error_message = "Not a disk of disk_gb, with the image that has the driver in it"
  }
  assert {
    condition = alltrue([
      google_compute_instance.vm[0].scheduling[0].provisioning_model == "STANDARD",
      google_compute_instance.vm[0].scheduling[0].preemptible == false,
      google_compute_instance.vm[0].scheduling[0].max_run_duration[0].seconds == 24 * 3600,
      google_compute_instance.vm[0].scheduling[0].instance_termination_action == "STOP",
      google_compute_instance.vm[0].scheduling[0].automatic_restart == false,
    ])
    error_message = "A Spot VM without being asked for, or a forgotten VM would not stop"
  }
  assert {
    condition     = length(google_compute_firewall.cluster) == 0
    error_message = "A rule between VMs, although there is only one"
  }
  assert {
    condition     = output.run == { damage-123456-jane = "python3 train_segmentation_model_prediction_thresholds.py --gcp-bucket gs://damage-data/stacks --dataset-directory <dataset_directory> --model-id <model_id> --optimizing-class-metric <optimizing_class_metric> --dataset-downsample-factor <dataset_downsample_factor>" }
    error_message = "Not the document's command: ${jsonencode(output.run)}"
  }
}

run "ssh_and_the_bucket_and_nothing_else" {
  command = plan

  assert {
    condition     = google_compute_firewall.ssh.source_ranges == toset(["203.0.113.7/32", "198.51.100.0/24"])
    error_message = "Not the given ranges"
  }
  assert {
    condition     = [for allow in google_compute_firewall.ssh.allow : "${allow.protocol} ${join(",", allow.ports)}"] == ["tcp 22"]
    error_message = "More or less than SSH"
  }
  assert {
    condition     = google_compute_firewall.ssh.target_tags == google_compute_instance.vm[0].tags
    error_message = "The rule does not reach the VM"
  }
  assert {
    condition     = google_compute_network.vm.auto_create_subnetworks == false && google_compute_network.vm.name != "default"
    error_message = "Not a separate network"
  }
  assert {
    condition = alltrue([
      google_compute_instance.vm[0].metadata["enable-oslogin"] == "FALSE",
      google_compute_instance.vm[0].metadata["block-project-ssh-keys"] == "TRUE",
      google_compute_instance.vm[0].metadata["ssh-keys"] == "jane:${trimspace(file("tests/key.pub"))}",
    ])
    error_message = "Not only the caller's key may log in"
  }
  assert {
    condition     = { for role, member in google_storage_bucket_iam_member.vm : role => "${member.role} ${member.bucket}" } == { for role in ["roles/storage.objectViewer", "roles/storage.objectCreator"] : role => "${role} damage-data" }
    error_message = "Not reading and creating objects in the one bucket"
  }
}

run "several_machines_with_jobs_of_their_own" {
  command = plan

  variables {
    number_of_machines = 3
  }

  assert {
    condition     = google_compute_instance.vm[*].name == ["damage-123456-jane", "damage-123456-jane-1", "damage-123456-jane-2"]
    error_message = "Not numbered from the second machine on: ${jsonencode(google_compute_instance.vm[*].name)}"
  }
  assert {
    condition     = length(google_compute_firewall.cluster) + length(terraform_data.cluster) + length(terraform_data.certificates) == 0
    error_message = "VMs that talk to each other without being asked to"
  }
  assert {
    condition     = keys(output.run) == google_compute_instance.vm[*].name
    error_message = "Not a command for each VM: ${jsonencode(output.run)}"
  }
}

run "a_cluster_whose_machines_talk_only_to_each_other" {
  command = plan

  variables {
    number_of_machines = 3
    cluster            = true
  }

  assert {
    condition     = google_compute_instance.vm[*].network_interface[0].network_ip == ["10.0.0.10", "10.0.0.11", "10.0.0.12"]
    error_message = "Not the addresses that the services are given"
  }
  assert {
    condition     = length(terraform_data.cluster) == 3 && length(terraform_data.certificates) == 1
    error_message = "Not all VMs in one cluster"
  }
  assert {
    condition     = keys(output.run) == ["damage-123456-jane"]
    error_message = "Not the document's command, on VM 0 only: ${jsonencode(output.run)}"
  }
  assert {
    condition = alltrue([
      one(google_compute_firewall.cluster).source_tags == toset(["damage-123456-jane"]),
      one(google_compute_firewall.cluster).target_tags == toset(["damage-123456-jane"]),
      alltrue([for vm in google_compute_instance.vm : vm.tags == toset(["damage-123456-jane"])]),
    ])
    error_message = "The rule is not from these VMs to these VMs"
  }
  assert {
    condition     = try(length(one(google_compute_firewall.cluster).source_ranges), 0) == 0
    error_message = "The rule lets in addresses, not only these VMs"
  }
  assert {
    condition     = [for allow in one(google_compute_firewall.cluster).allow : "${allow.protocol} ${join(",", coalesce(allow.ports, []))}"] == ["tcp 8786,8788-8789"]
    error_message = "Not the ports of the scheduler, the workers and their nannies"
  }
}

# If something is missing in a targeted plan, Terraform 1.11 crashes instead of showing the message below.
run "one_target_brings_what_it_needs" {
  command = plan

  variables {
    number_of_machines = 3
    cluster            = true
  }

  plan_options {
    target = [google_compute_instance.vm[1]]
  }

  assert {
    condition     = google_compute_instance.vm[1].name == "damage-123456-jane-1"
    error_message = "Not the one VM: ${jsonencode(google_compute_instance.vm)}"
  }
  assert {
    condition     = google_compute_firewall.ssh.name == "damage-123456-jane-ssh" && google_compute_firewall.cluster[0].name == "damage-123456-jane-cluster"
    error_message = "Not the firewall rules"
  }
  assert {
    condition     = length(google_storage_bucket_iam_member.vm) == 2 && google_service_account.vm.account_id != ""
    error_message = "Not the access to the bucket"
  }
  assert {
    condition     = google_compute_subnetwork.vm.name == "damage-123456-jane" && google_compute_network.vm.name == "damage-123456-jane"
    error_message = "Not the network"
  }
  assert {
    condition     = output.one_of_several["damage-123456-jane-1"] == "terraform apply -lock=false -target='google_compute_instance.vm[1]'"
    error_message = "Not the -target form: ${jsonencode(output.one_of_several)}"
  }
}

run "spot_with_two_a100_in_the_machine_type" {
  command = plan

  variables {
    spot          = true
    max_run_hours = 1.5
    gpu_type      = "A100"
    gpu_count     = 2
  }

  assert {
    condition = alltrue([
      google_compute_instance.vm[0].scheduling[0].provisioning_model == "SPOT",
      google_compute_instance.vm[0].scheduling[0].preemptible,
      google_compute_instance.vm[0].scheduling[0].instance_termination_action == "STOP",
      google_compute_instance.vm[0].scheduling[0].automatic_restart == false,
      google_compute_instance.vm[0].scheduling[0].max_run_duration[0].seconds == 5400,
    ])
    error_message = "Not a Spot VM that stops"
  }
  assert {
    condition     = google_compute_instance.vm[0].machine_type == "a2-highgpu-2g" && length(google_compute_instance.vm[0].guest_accelerator) == 0
    error_message = "Not a machine type with two A100"
  }
  assert {
    condition     = google_compute_instance.vm[0].scheduling[0].on_host_maintenance == "TERMINATE"
    error_message = "A VM with a GPU cannot migrate"
  }
}

run "four_p100_attached" {
  command = plan

  variables {
    gpu_type  = "P100"
    gpu_count = 4
  }

  assert {
    condition     = google_compute_instance.vm[0].machine_type == "n1-standard-32"
    error_message = "Not a machine type that takes four GPUs: ${google_compute_instance.vm[0].machine_type}"
  }
  assert {
    condition     = [for gpu in google_compute_instance.vm[0].guest_accelerator : "${gpu.count} ${gpu.type}"] == ["4 nvidia-tesla-p100"]
    error_message = "Not four P100 attached"
  }
}

run "long_names_made_valid_and_a_t4" {
  command = plan

  variables {
    project_name       = "a-very-long-project-1234567890"
    user_name          = "Jane.van_der-Doe-Smythe-Featherstonehaugh@example.org"
    number_of_machines = 12
    cluster            = true
    gpu_type           = "T4"
  }

  assert {
    condition     = google_compute_instance.vm[0].name == "a-very-long-project-1234567890-jane-van-der-doe-smythe"
    error_message = "Not the name in lower-case letters, digits and hyphens: ${google_compute_instance.vm[0].name}"
  }
  assert {
    condition = alltrue([
      for name in concat(google_compute_instance.vm[*].name, [google_compute_network.vm.name, google_compute_subnetwork.vm.name, google_compute_firewall.ssh.name, google_compute_firewall.cluster[0].name]) :
      can(regex("^[a-z]([a-z0-9-]{0,61}[a-z0-9])?$", name))
    ])
    error_message = "Google Cloud would refuse a name"
  }
  assert {
    condition     = length(distinct(google_compute_instance.vm[*].name)) == 12
    error_message = "Two VMs have the same name"
  }
  assert {
    condition     = can(regex("^[a-z][a-z0-9-]{4,28}[a-z0-9]$", google_service_account.vm.account_id))
    error_message = "Not a valid ID of a service account: ${google_service_account.vm.account_id}"
  }
  assert {
    condition     = startswith(google_compute_instance.vm[0].metadata["ssh-keys"], "jane-van-der-doe-smy:ssh-ed25519 ")
    error_message = "Not a Linux user name: ${google_compute_instance.vm[0].metadata["ssh-keys"]}"
  }
  assert {
    condition     = [for gpu in google_compute_instance.vm[0].guest_accelerator : "${gpu.count} ${gpu.type}"] == ["1 nvidia-tesla-t4"] && google_compute_instance.vm[0].machine_type == "n1-standard-8"
    error_message = "Not one T4 attached"
  }
}

run "short_names_made_valid_and_eight_v100" {
  command = plan

  variables {
    project_name = "p1"
    user_name    = "J_"
    gpu_type     = "V100"
    gpu_count    = 8
  }

  assert {
    condition     = google_compute_instance.vm[0].name == "p1-j" && can(regex("^[a-z][a-z0-9-]{4,28}[a-z0-9]$", google_service_account.vm.account_id))
    error_message = "Not valid: ${google_compute_instance.vm[0].name}, ${google_service_account.vm.account_id}"
  }
  assert {
    condition     = [for gpu in google_compute_instance.vm[0].guest_accelerator : "${gpu.count} ${gpu.type}"] == ["8 nvidia-tesla-v100"] && google_compute_instance.vm[0].machine_type == "n1-standard-64"
    error_message = "Not eight V100 attached"
  }
}
