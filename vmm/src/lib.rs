//! A minimal KVM virtual machine monitor: it boots a Linux guest whose network devices are vhost-user
//! back-ends.
//!
//! [`config`] reads the command line, [`run()`] does the rest: guest memory and the kernel in it (`memory`,
//! `boot`, `acpi`), the VM (`vm`, `cpu_state`, `vcpu`), its devices (`mmio_bus`, `serial`, `power`, `virtio`) and
//! their back-ends (`vhost_user`), the
//! control socket (`control`), and the loop that waits for the end (`run`).

pub mod config;

mod acpi;
mod boot;
mod control;
mod cpu_state;
mod event;
mod host_time;
mod incoming;
mod kvm_structure;
mod lifecycle;
mod machine;
mod memory;
mod migration;
mod mmio_bus;
mod platform;
mod power;
mod run;
mod serial;
mod shutdown;
mod terminal;
mod vcpu;
mod vcpu_state;
mod vhost_user;
mod virtio;
mod vm;

pub use run::{RunError, run};
