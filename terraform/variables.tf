variable "project_name" {
  description = "The ID of your Google Cloud project: `gcloud config get project` prints it."
  type        = string

  validation {
    condition     = can(regex("^[a-z][a-z0-9.:-]*[a-z0-9]$", var.project_name))
    error_message = "project_name is a project ID: lower-case letters, digits and hyphens, such as my-project-123456."
  }
}

variable "user_name" {
  description = "Your Google Cloud user name. The VMs' names end with it and, in a form that Linux accepts, it is your user name on them."
  type        = string

  validation {
    condition     = can(regex("^[A-Za-z][A-Za-z0-9._@-]*$", var.user_name)) && lower(var.user_name) != "root"
    error_message = "user_name starts with a letter, has only letters, digits and . _ @ - after it, and is not root."
  }
}

variable "gcp_bucket" {
  description = "The bucket of the datasets and models, as --gcp-bucket takes it: gs://name or gs://name/folder. The VMs may read and create objects in it."
  type        = string

  validation {
    condition     = can(regex("^gs://[a-z0-9][a-z0-9._-]{1,220}[a-z0-9](/|$)", var.gcp_bucket))
    error_message = "gcp_bucket starts with gs:// and a bucket name, such as gs://my-bucket."
  }
}

variable "ssh_source_ranges" {
  description = "The IPv4 ranges that may reach the VMs by SSH. For only your own address: [\"203.0.113.7/32\"]."
  type        = list(string)

  validation {
    condition     = length(var.ssh_source_ranges) > 0
    error_message = "ssh_source_ranges is empty: nobody could log in, not even Terraform."
  }

  validation {
    condition = alltrue([
      for range in var.ssh_source_ranges :
      can(cidrnetmask(range)) && try(cidrsubnet(range, 0, 0) == range && tonumber(split("/", range)[1]) >= 8, false)
    ])
    error_message = "ssh_source_ranges are IPv4 ranges no wider than /8, with no bits set after the prefix, such as 203.0.113.7/32 or 203.0.113.0/24. The whole internet (0.0.0.0/0) is not allowed."
  }
}

variable "ssh_private_key_file" {
  description = "The file of the private key, without a passphrase, with which Terraform and you log in. The public key is in the same folder, with .pub at the end of its name."
  type        = string
  default     = "~/.ssh/necstlab-damage-segmentation"

  validation {
    condition     = fileexists(pathexpand(var.ssh_private_key_file)) && fileexists(pathexpand("${var.ssh_private_key_file}.pub"))
    error_message = "ssh_private_key_file: ${var.ssh_private_key_file} or ${var.ssh_private_key_file}.pub does not exist. Create the pair: ssh-keygen -t ed25519 -N '' -f ${var.ssh_private_key_file}"
  }
}

variable "number_of_machines" {
  description = "The number of VMs."
  type        = number
  default     = 1

  validation {
    condition     = var.number_of_machines == floor(var.number_of_machines) && var.number_of_machines >= 1 && var.number_of_machines <= 64
    error_message = "number_of_machines is a whole number from 1 to 64."
  }
}

variable "cluster" {
  description = "true: the VMs share each job, which you start on VM 0. false: each VM does jobs of its own."
  type        = bool
  default     = false
}

variable "gpu_type" {
  description = "L4, T4, P100, V100 or A100 (40 GB)."
  type        = string
  default     = "L4"

  validation {
    condition     = contains(keys(local.gpus), var.gpu_type)
    error_message = "gpu_type is one of ${join(", ", keys(local.gpus))}. TensorFlow no longer supports older GPUs, such as K80."
  }
}

variable "gpu_count" {
  description = "The number of GPUs of each VM: 1, 2, 4 or 8; at most 4 for T4 and P100."
  type        = number
  default     = 1

  validation {
    condition     = contains(keys(try(local.gpus[var.gpu_type].machine_types, {})), tostring(var.gpu_count))
    error_message = "gpu_count is one of ${join(", ", keys(try(local.gpus[var.gpu_type].machine_types, {})))} for gpu_type ${var.gpu_type}."
  }
}

variable "zone" {
  description = "Where the VMs run: a zone that has the GPU type (`gcloud compute accelerator-types list`), in the region of the bucket, because reading across regions is slow and costs money."
  type        = string
  default     = "us-central1-c"

  validation {
    condition     = can(regex("^[a-z]+-[a-z]+[0-9]+-[a-z]$", var.zone))
    error_message = "zone is a zone, not a region: us-central1-c, not us-central1."
  }
}

variable "spot" {
  description = "Use Spot VMs: they cost far less, but Google may stop them at any time."
  type        = bool
  default     = false
}

variable "max_run_hours" {
  description = "A VM stops after this number of hours, so that a forgotten GPU does not cost a fortune. Its disk remains. Changing this replaces the VM."
  type        = number
  default     = 24

  validation {
    condition     = var.max_run_hours >= 1 && var.max_run_hours <= 2880
    error_message = "max_run_hours is between 1 and 2880 (120 days)."
  }
}

variable "disk_gb" {
  description = "Size of the boot disk in GB: the system and the environment take about 50, the copies of the dataset and the model the rest. Changing this replaces the VM by one with an empty disk; docs/vm.md says how to make the disk larger and keep its content."
  type        = number
  default     = 200

  validation {
    condition     = var.disk_gb == floor(var.disk_gb) && var.disk_gb >= 100 && var.disk_gb <= 64000
    error_message = "disk_gb is a whole number from 100 to 64000."
  }
}

variable "image" {
  description = "The boot image: Ubuntu 24.04 with the NVIDIA driver."
  type        = string
  default     = "projects/deeplearning-platform-release/global/images/family/common-cu129-ubuntu-2404-nvidia-580"
}
