//! A minimal KVM virtual machine monitor for a Linux guest whose network devices are vhost-user back-ends.
//!
//! [`config`] reads the command line. [`run()`] builds the rest and waits for the end: guest memory and the kernel in
//! it (`memory`, `boot`, `acpi`), the VM (`vm`, `cpu_state`, `vcpu`), its devices (`mmio_bus`, `serial`, `power`,
//! `virtio`), their back-ends (`vhost_user`), and the control socket (`control`). `lifecycle` and `migration` pause,
//! resume and migrate the VM.

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
