# Values that the variables refuse: in each run, one for each of the variables that it names.

mock_provider "google" {}

variables {
  project_name         = "damage-123456"
  user_name            = "jane"
  gcp_bucket           = "gs://damage-data"
  ssh_source_ranges    = ["203.0.113.7/32"]
  ssh_private_key_file = "tests/key"
}

run "wrong_names_and_numbers" {
  command = plan

  variables {
    project_name         = "My Project"
    user_name            = "4jane"
    gcp_bucket           = "damage-data"
    ssh_source_ranges    = ["0.0.0.0/0"]
    ssh_private_key_file = "tests/no-such-key"
    number_of_machines   = 0
    gpu_count            = 3
    zone                 = "us-central1"
    max_run_hours        = 0
    disk_gb              = 20
  }

  expect_failures = [
    var.project_name,
    var.user_name,
    var.gcp_bucket,
    var.ssh_source_ranges,
    var.ssh_private_key_file,
    var.number_of_machines,
    var.gpu_count,
    var.zone,
    var.max_run_hours,
    var.disk_gb,
  ]
}

run "root_key_without_the_public_key_half_a_machine_eight_t4" {
  command = plan

  variables {
    user_name            = "root"
    ssh_source_ranges    = ["203.0.113.7/32", "128.0.0.0/1"]
    ssh_private_key_file = "tests/key.pub"
    number_of_machines   = 1.5
    gpu_type             = "T4"
    gpu_count            = 8
  }

  expect_failures = [
    var.user_name,
    var.ssh_source_ranges,
    var.ssh_private_key_file,
    var.number_of_machines,
    var.gpu_count,
  ]
}

run "k80_and_no_range" {
  command = plan

  variables {
    ssh_source_ranges = []
    gpu_type          = "K80"
  }

  expect_failures = [var.ssh_source_ranges, var.gpu_type]
}

run "bits_after_the_prefix" {
  command = plan

  variables {
    ssh_source_ranges = ["203.0.113.7/24"]
  }

  expect_failures = [var.ssh_source_ranges]
}

run "ipv6_range" {
  command = plan

  variables {
    ssh_source_ranges = ["2001:db8::/32"]
  }

  expect_failures = [var.ssh_source_ranges]
}
