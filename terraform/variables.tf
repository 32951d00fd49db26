variable "project_name" {
  description = "Your Google Cloud project, as its ID spells it: `gcloud config get project` prints it."
  type        = string

  validation {
    condition     = can(regex("^[a-z][a-z0-9.:-]*[a-z0-9]$", var.project_name))
    error_message = "project_name is a project ID: lower-case letters, digits and hyphens, such as my-project-123456."
  }
}

variable "user_name" {
  description = "Your Google Cloud user name. It ends the names of the VMs and, in a form that Linux accepts, it is your user on them."
  type        = string

  validation {
    condition     = can(regex("^[A-Za-z][A-Za-z0-9._@-]*$", var.user_name)) && lower(var.user_name) != "root"
    error_message = "user_name starts with a letter, continues with letters, digits and . _ @ - only, and is not root."
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
  description = "The IPv4 ranges that may reach the VMs by SSH. Your own address only: [\"203.0.113.7/32\"]."
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
    error_message = "ssh_source_ranges are IPv4 ranges no wider than /8, with no bits set behind the prefix, such as 203.0.113.7/32 or 203.0.113.0/24. The whole internet (0.0.0.0/0) is not one of them."
  }
}

variable "ssh_private_key_file" {
  description = "The private key, without a passphrase, that Terraform and you log in with; the public key lies beside it with .pub added."
  type        = string
  default     = "~/.ssh/necstlab-damage-segmentation"

  validation {
    condition     = fileexists(pathexpand(var.ssh_private_key_file)) && fileexists(pathexpand("${var.ssh_private_key_file}.pub"))
    error_message = "ssh_private_key_file: ${var.ssh_private_key_file} or ${var.ssh_private_key_file}.pub is not there. Create the pair: ssh-keygen -t ed25519 -N '' -f ${var.ssh_private_key_file}"
  }
}

variable "number_of_machines" {
  description = "How many VMs."
  type        = number
  default     = 1

  validation {
    condition     = var.number_of_machines == floor(var.number_of_machines) && var.number_of_machines >= 1 && var.number_of_machines <= 64
    error_message = "number_of_machines is a whole number from 1 to 64."
  }
}

variable "gpu_type" {
  description = "L4, T4, P100, V100 or A100 (40 GB)."
  type        = string
  default     = "L4"

  validation {
    condition     = contains(keys(local.gpus), var.gpu_type)
    error_message = "gpu_type is one of ${join(", ", keys(local.gpus))}. TensorFlow no longer supports older ones, such as K80."
  }
}

variable "gpu_count" {
  description = "How many GPUs each VM has: 1, 2, 4 or 8; T4 and P100 end at 4."
  type        = number
  default     = 1

  validation {
    condition     = contains(keys(try(local.gpus[var.gpu_type].machine_types, {})), tostring(var.gpu_count))
    error_message = "gpu_count is one of ${join(", ", keys(try(local.gpus[var.gpu_type].machine_types, {})))} for gpu_type ${var.gpu_type}."
  }
}

variable "zone" {
  description = "Where the VMs run. Take one that has the GPU type (`gcloud compute accelerator-types list`) in the region of the bucket: reading across regions is slow and costs money."
  type        = string
  default     = "us-central1-c"

  validation {
    condition     = can(regex("^[a-z]+-[a-z]+[0-9]+-[a-z]$", var.zone))
    error_message = "zone is a zone, not a region: us-central1-c, not us-central1."
  }
}

variable "spot" {
  description = "Spot VMs cost far less, and Google may stop them at any time."
  type        = bool
  default     = false
}

variable "max_run_hours" {
  description = "A VM stops after this many hours, so that a forgotten GPU does not cost a fortune; its disk stays. Changing this recreates the VM."
  type        = number
  default     = 24

  validation {
    condition     = var.max_run_hours >= 1 && var.max_run_hours <= 2880
    error_message = "max_run_hours is between 1 and 2880 (120 days)."
  }
}

variable "disk_gb" {
  description = "Size of the boot disk in GB: the system and the environment take about 50, the copies of the dataset and the model the rest. Changing this recreates the VM, with an empty disk. To keep what is on it: `gcloud compute disks resize <VM> --size <GB>GB --zone <zone>`, the same number here, and stop and start the VM."
  type        = number
  default     = 200

  validation {
    condition     = var.disk_gb == floor(var.disk_gb) && var.disk_gb >= 100 && var.disk_gb <= 64000
    error_message = "disk_gb is a whole number from 100 to 64000."
  }
}

variable "image" {
  description = "The boot image: Ubuntu 24.04 with the NVIDIA driver in it."
  type        = string
  default     = "projects/deeplearning-platform-release/global/images/family/common-cu129-ubuntu-2404-nvidia-580"
}

variable "cluster_port" {
  description = "The port on which the VMs of one job talk to each other, when number_of_machines is above 1."
  type        = number
  default     = 2222

  validation {
    condition     = var.cluster_port == floor(var.cluster_port) && var.cluster_port >= 1024 && var.cluster_port <= 65535
    error_message = "cluster_port is a whole number from 1024 to 65535."
  }
}
