//! A guest on QEMU: under KVM in the lab, emulated anywhere.

use std::process::Command;

use anyhow::Result;

use super::{Guest, KERNEL_COMMAND_LINE};
use crate::images;
use crate::link::Meeting;

/// What runs the guest's instructions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Accelerator {
    /// The processor.
    Kvm,
    /// QEMU itself.
    Tcg,
}

/// A QEMU about to be started.
#[derive(Debug)]
pub struct Qemu {
    command: Command,
    accelerator: Accelerator,
}

impl Qemu {
    /// With these processors and this memory (as QEMU's `-m`), which other processes can share, and no device but
    /// the console.
    pub fn new(accelerator: Accelerator, cpus: u16, memory: &str) -> Result<Self> {
        let mut command = Command::new("qemu-system-x86_64");
        command.args([
            "-nodefaults",
            "-no-user-config",
            "-display",
            "none",
            "-monitor",
            "none",
            "-no-reboot",
        ]);
        command.args(match accelerator {
            Accelerator::Kvm => ["-accel", "kvm", "-cpu", "host"],
            Accelerator::Tcg => ["-accel", "tcg,thread=multi", "-cpu", "max"],
        });
        command.args(["-smp", &cpus.to_string(), "-m", memory, "-machine", "q35,memory-backend=memory"]);
        command.args(["-object", &format!("memory-backend-memfd,id=memory,size={memory},share=on")]);
        command.arg("-kernel").arg(images::guest_kernel()?).arg("-initrd").arg(images::guest_initramfs()?);
        command.args(["-append", KERNEL_COMMAND_LINE, "-serial", "stdio"]);
        Ok(Self { command, accelerator })
    }

    /// Further options.
    pub fn args<'a>(mut self, arguments: impl IntoIterator<Item = &'a str>) -> Self {
        self.command.args(arguments);
        self
    }

    /// A network device whose back-end meets QEMU at this socket, and again should it leave.
    ///
    /// Without MSI-X where QEMU emulates: some versions' vhost-user does not work with both.
    pub fn vhost_user(self, id: &str, socket: &str, meeting: Meeting, mac: &str, queue_pairs: u16) -> Self {
        let queues = if queue_pairs > 1 { format!(",queues={queue_pairs}") } else { String::new() };
        let mq = if queue_pairs > 1 { ",mq=on" } else { "" };
        let vectors = match self.accelerator {
            Accelerator::Kvm => 2 * queue_pairs + 2,
            Accelerator::Tcg => 0,
        };
        let socket = socket.replace(',', ",,");
        let how = match meeting {
            Meeting::BackendListens => "reconnect=1",
            Meeting::FrontendListens => "server=on",
        };
        self.args([
            "-chardev",
            &format!("socket,id=chardev-{id},path={socket},{how}"),
            "-netdev",
            &format!("vhost-user,id=netdev-{id},chardev=chardev-{id}{queues}"),
            "-device",
            &format!("virtio-net-pci,id={id},netdev=netdev-{id},mac={mac},vectors={vectors}{mq}"),
        ])
    }

    /// Starts it: [`Guest::start`].
    pub fn start(self, name: &str) -> Result<Guest> {
        Guest::start(&self.command, name)
    }
}
