//! A minimal KVM virtual machine monitor.
