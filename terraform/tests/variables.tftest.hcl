# Values that the variables refuse.

mock_provider "google" {}

variables {
  project_name         = "damage-123456"
  user_name            = "jane"
  gcp_bucket           = "gs://damage-data"
  ssh_source_ranges    = ["203.0.113.7/32"]
  ssh_private_key_file = "tests/key"
}

run "whole_internet" {
  command = plan

  variables {
    ssh_source_ranges = ["0.0.0.0/0"]
  }

  expect_failures = [var.ssh_source_ranges]
}

run "half_the_internet" {
  command = plan

  variables {
    ssh_source_ranges = ["203.0.113.7/32", "128.0.0.0/1"]
  }

  expect_failures = [var.ssh_source_ranges]
}

run "no_range" {
  command = plan

  variables {
    ssh_source_ranges = []
  }

  expect_failures = [var.ssh_source_ranges]
}

run "address_without_prefix" {
  command = plan

  variables {
    ssh_source_ranges = ["203.0.113.7"]
  }

  expect_failures = [var.ssh_source_ranges]
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

run "project_number_sign" {
  command = plan

  variables {
    project_name = "My Project"
  }

  expect_failures = [var.project_name]
}

run "user_starts_with_a_digit" {
  command = plan

  variables {
    user_name = "4jane"
  }

  expect_failures = [var.user_name]
}

run "user_root" {
  command = plan

  variables {
    user_name = "root"
  }

  expect_failures = [var.user_name]
}

run "bucket_without_gs" {
  command = plan

  variables {
    gcp_bucket = "damage-data"
  }

  expect_failures = [var.gcp_bucket]
}

run "no_such_key" {
  command = plan

  variables {
    ssh_private_key_file = "tests/no-such-key"
  }

  expect_failures = [var.ssh_private_key_file]
}

run "key_without_the_public_key" {
  command = plan

  variables {
    ssh_private_key_file = "tests/key.pub"
  }

  expect_failures = [var.ssh_private_key_file]
}

run "no_machine" {
  command = plan

  variables {
    number_of_machines = 0
  }

  expect_failures = [var.number_of_machines]
}

run "half_a_machine" {
  command = plan

  variables {
    number_of_machines = 1.5
  }

  expect_failures = [var.number_of_machines]
}

run "k80" {
  command = plan

  variables {
    gpu_type = "K80"
  }

  expect_failures = [var.gpu_type]
}

run "three_gpus" {
  command = plan

  variables {
    gpu_count = 3
  }

  expect_failures = [var.gpu_count]
}

run "region_for_zone" {
  command = plan

  variables {
    zone = "us-central1"
  }

  expect_failures = [var.zone]
}

run "no_time" {
  command = plan

  variables {
    max_run_hours = 0
  }

  expect_failures = [var.max_run_hours]
}

run "disk_too_small" {
  command = plan

  variables {
    disk_gb = 20
  }

  expect_failures = [var.disk_gb]
}

run "eight_t4" {
  command = plan

  variables {
    gpu_type  = "T4"
    gpu_count = 8
  }

  expect_failures = [var.gpu_count]
}
