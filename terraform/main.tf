locals {
  # Some machine types have the GPU in them: there, accelerator is null. To n1 machines it is attached.
  gpus = {
    L4   = { accelerator = null, machine_types = { 1 = "g2-standard-8", 2 = "g2-standard-24", 4 = "g2-standard-48", 8 = "g2-standard-96" } }
    T4   = { accelerator = "nvidia-tesla-t4", machine_types = { 1 = "n1-standard-8", 2 = "n1-standard-16", 4 = "n1-standard-32" } }
    P100 = { accelerator = "nvidia-tesla-p100", machine_types = { 1 = "n1-standard-8", 2 = "n1-standard-16", 4 = "n1-standard-32" } }
    V100 = { accelerator = "nvidia-tesla-v100", machine_types = { 1 = "n1-standard-8", 2 = "n1-standard-16", 4 = "n1-standard-32", 8 = "n1-standard-64" } }
    A100 = { accelerator = null, machine_types = { 1 = "a2-highgpu-1g", 2 = "a2-highgpu-2g", 4 = "a2-highgpu-4g", 8 = "a2-highgpu-8g" } }
  }
  gpu = local.gpus[var.gpu_type]

  # <project_name>-<user_name> in a form that Google Cloud accepts: at most 63 characters with the longest suffix, "-cluster".
  clean_name = replace(lower("${var.project_name}-${var.user_name}"), "/[^a-z0-9]+/", "-")
  name       = trim(substr(local.clean_name, 0, 55), "-")
  names      = [for i in range(var.number_of_machines) : i == 0 ? local.name : "${local.name}-${i}"]

  # A service account's ID has 6 to 30 characters; the hash makes shortened IDs different.
  linux_user      = trim(substr(replace(lower(var.user_name), "/[^a-z0-9]+/", "-"), 0, 20), "-")
  service_account = "vm-${local.linux_user}-${substr(sha1("${var.project_name} ${var.user_name}"), 0, 6)}"

  bucket  = split("/", trimprefix(var.gcp_bucket, "gs://"))[0]
  region  = join("-", slice(split("-", var.zone), 0, 2))
  code    = "~/necstlab-damage-segmentation"
  tarball = "${path.module}/.terraform/code"

  # Beside Terraform's state: VMs that come later need the same certificates.
  certificates = "${path.module}/certificates"

  # Fixed addresses, so that the workers of a cluster find the scheduler on VM 0, also after a stop. Google uses the first
  # addresses of a subnetwork.
  subnetwork = "10.0.0.0/24"
  addresses  = [for i in range(var.number_of_machines) : cidrhost(local.subnetwork, i + 10)]
}

resource "google_compute_network" "vm" {
  name                    = local.name
  auto_create_subnetworks = false
}

resource "google_compute_subnetwork" "vm" {
  name          = local.name
  region        = local.region
  network       = google_compute_network.vm.id
  ip_cidr_range = local.subnetwork
}

resource "google_compute_firewall" "ssh" {
  name          = "${local.name}-ssh"
  network       = google_compute_network.vm.id
  source_ranges = var.ssh_source_ranges
  target_tags   = [local.name]

  allow {
    protocol = "tcp"
    ports    = ["22"]
  }
}

resource "google_compute_firewall" "cluster" {
  count       = var.cluster ? 1 : 0
  name        = "${local.name}-cluster"
  network     = google_compute_network.vm.id
  source_tags = [local.name]
  target_tags = [local.name]

  # The scheduler, each VM's worker and its nanny: the ports in dask-scheduler.service and dask-worker.service.
  allow {
    protocol = "tcp"
    ports    = ["8786", "8788-8789"]
  }
}

resource "google_service_account" "vm" {
  account_id   = local.service_account
  display_name = "VMs ${local.name}"
}

# The two roles can read and create objects, but not overwrite or delete them.
resource "google_storage_bucket_iam_member" "vm" {
  for_each = toset(["roles/storage.objectViewer", "roles/storage.objectCreator"])
  bucket   = local.bucket
  role     = each.value
  member   = "serviceAccount:${google_service_account.vm.email}"
}

resource "google_compute_instance" "vm" {
  count        = var.number_of_machines
  name         = local.names[count.index]
  zone         = var.zone
  machine_type = local.gpu.machine_types[var.gpu_count]
  tags         = [local.name]

  # A VM needs these but does not refer to them: listed here, `apply -target` of one VM creates them too.
  depends_on = [
    google_compute_firewall.ssh,
    google_compute_firewall.cluster,
    google_storage_bucket_iam_member.vm,
  ]

  dynamic "guest_accelerator" {
    for_each = local.gpu.accelerator == null ? [] : [local.gpu.accelerator]
    content {
      type  = guest_accelerator.value
      count = var.gpu_count
    }
  }

  boot_disk {
    initialize_params {
      image = var.image
      size  = var.disk_gb
      type  = "pd-balanced"
    }
  }

  network_interface {
    subnetwork = google_compute_subnetwork.vm.id
    network_ip = local.addresses[count.index]
    access_config {}
  }

  service_account {
    email  = google_service_account.vm.email
    scopes = ["cloud-platform"]
  }

  scheduling {
    provisioning_model          = var.spot ? "SPOT" : "STANDARD"
    preemptible                 = var.spot
    on_host_maintenance         = "TERMINATE" # a VM with a GPU cannot move to another host
    automatic_restart           = false       # the job would not start again by itself, but the GPU would cost money
    instance_termination_action = "STOP"

    max_run_duration {
      seconds = floor(var.max_run_hours * 3600)
    }
  }

  shielded_instance_config {
    enable_secure_boot          = false # it would refuse the GPU's driver, which is not signed
    enable_vtpm                 = true
    enable_integrity_monitoring = true
  }

  metadata = {
    enable-oslogin         = "FALSE"
    block-project-ssh-keys = "TRUE"
    ssh-keys               = "${local.linux_user}:${trimspace(file(pathexpand("${var.ssh_private_key_file}.pub")))}"
    install-nvidia-driver  = "True"
  }

  connection {
    type        = "ssh"
    host        = self.network_interface[0].access_config[0].nat_ip
    user        = local.linux_user
    private_key = file(pathexpand(var.ssh_private_key_file))
    timeout     = "10m"
  }

  provisioner "local-exec" {
    command = "bash '${path.module}/pack_code.sh' '${local.tarball}-${count.index}.tar.gz'"
  }

  provisioner "file" {
    source      = "${local.tarball}-${count.index}.tar.gz"
    destination = "/tmp/code.tar.gz"
  }

  provisioner "remote-exec" {
    inline = [
      "set -e",
      "mkdir -p ${local.code}",
      "tar -xzf /tmp/code.tar.gz -C ${local.code}",
      "bash ${local.code}/terraform/set_up_vm.sh",
    ]
  }
}

resource "terraform_data" "certificates" {
  count = var.cluster ? 1 : 0

  provisioner "local-exec" {
    command = "bash '${path.module}/make_certificates.sh' '${local.certificates}'"
  }
}

# Apart from the VM, so that `cluster` can be changed for VMs that exist, and a failure here does not replace the VM.
resource "terraform_data" "cluster" {
  count            = var.cluster ? var.number_of_machines : 0
  triggers_replace = [google_compute_instance.vm[count.index].instance_id, one(terraform_data.certificates[*].id)]

  connection {
    type        = "ssh"
    host        = google_compute_instance.vm[count.index].network_interface[0].access_config[0].nat_ip
    user        = local.linux_user
    private_key = file(pathexpand(var.ssh_private_key_file))
    timeout     = "10m"
  }

  provisioner "remote-exec" {
    inline = ["mkdir -p ~/.config/necstlab-cluster && chmod 700 ~/.config/necstlab-cluster"]
  }

  provisioner "file" {
    source      = "${local.certificates}/"
    destination = ".config/necstlab-cluster"
  }

  provisioner "remote-exec" {
    inline = ["bash ${local.code}/terraform/join_cluster.sh ${local.addresses[0]} ${local.addresses[count.index]}"]
  }
}
