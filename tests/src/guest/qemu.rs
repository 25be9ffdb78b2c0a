//! A guest on QEMU: under KVM in the lab, or emulated on any machine.

use std::fs::{self, File};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};
use nix::fcntl::{FcntlArg, FdFlag, fcntl};

use super::{Guest, KERNEL_COMMAND_LINE};
use crate::datapath::Datapath;
use crate::images;
use crate::link::Meeting;
use crate::qmp::Qmp;

/// The type of QEMU's memory object, which is also the name of its memfd.
const MEMORY: &str = "memory-backend-memfd";

/// What executes the guest's instructions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Accelerator {
    /// The processor.
    Kvm,
    /// QEMU's emulation.
    Tcg,
}

impl Accelerator {
    /// Returns the accelerator for tests with this datapath: emulation, which does not need the lab, or KVM with the
    /// kernel's datapath, which needs the lab anyway.
    pub fn with(datapath: Datapath) -> Self {
        match datapath {
            Datapath::Userspace => Self::Tcg,
            Datapath::VhostNet => Self::Kvm,
        }
    }
}

/// A QEMU to be started.
#[derive(Debug)]
pub struct Qemu {
    command: Command,
    accelerator: Accelerator,
}

impl Qemu {
    /// Creates a QEMU with this number of processors, this size of shared memory (as for `-m`), and only a console.
    pub fn new(accelerator: Accelerator, cpus: u16, memory: &str) -> Result<Self> {
        let object = format!("{MEMORY},id=memory,size={memory},share=on");
        Self::with_memory(accelerator, cpus, memory, &object)
    }

    /// Like [`Self::new`], with the memory in a file, which another QEMU can also use.
    pub fn in_file(accelerator: Accelerator, cpus: u16, memory: &str, file: &Path) -> Result<Self> {
        let file = file.to_str().context("the path of the memory file is not UTF-8")?.replace(',', ",,");
        let object = format!("memory-backend-file,id=memory,size={memory},mem-path={file},share=on");
        Self::with_memory(accelerator, cpus, memory, &object)
    }

    fn with_memory(accelerator: Accelerator, cpus: u16, memory: &str, object: &str) -> Result<Self> {
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
        command.args(["-object", object]);
        command.arg("-kernel").arg(images::guest_kernel()?).arg("-initrd").arg(images::guest_initramfs()?);
        command.args(["-append", KERNEL_COMMAND_LINE, "-serial", "stdio"]);
        Ok(Self { command, accelerator })
    }

    /// Adds options.
    pub fn args<'a>(mut self, arguments: impl IntoIterator<Item = &'a str>) -> Self {
        self.command.args(arguments);
        self
    }

    /// Adds a network device whose back-end uses this socket, and reconnects after the back-end has left.
    ///
    /// An emulated guest has no MSI-X: vhost-user does not work with both in some versions of QEMU.
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

    /// Starts QEMU with [`Guest::start`].
    pub fn start(self, name: &str) -> Result<Guest> {
        Guest::start(&self.command, name)
    }

    /// Starts QEMU with a monitor.
    pub fn start_with_monitor(mut self, name: &str) -> Result<(Guest, Qmp)> {
        let (ours, qemus) = UnixStream::pair().context("cannot create a socket pair")?;
        let qemus = OwnedFd::from(qemus);
        fcntl(&qemus, FcntlArg::F_SETFD(FdFlag::empty())).context("cannot make a socket inheritable")?;
        self.command.arg("-chardev").arg(format!("socket,id=monitor,fd={}", qemus.as_raw_fd()));
        self.command.args(["-mon", "chardev=monitor,mode=control"]);
        let guest = self.start(name)?;
        // If this process kept QEMU's end open, it would not notice when QEMU ends.
        drop(qemus);
        let monitor = Qmp::new(ours).with_context(|| format!("no monitor of {name}: {}", guest.log()))?;
        Ok((guest, monitor))
    }

    /// Makes QEMU reset the guest when it reboots, instead of exiting.
    pub fn rebooting(self) -> Self {
        self.args(["-action", "reboot=reset"])
    }

    /// Makes QEMU wait for an incoming migration, and keep the guest stopped after it.
    pub fn incoming(self) -> Self {
        self.args(["-incoming", "defer", "-S"])
    }
}

impl Guest {
    /// Opens the memory of a guest on QEMU, through a descriptor of the process.
    pub fn memory(&self) -> Result<File> {
        let folder = format!("/proc/{}/fd", self.process());
        for entry in fs::read_dir(&folder).with_context(|| folder.clone())? {
            let path = entry?.path();
            // Fails for a descriptor that was closed in the meantime.
            if fs::read_link(&path).is_ok_and(|target| target.to_string_lossy().contains(MEMORY)) {
                return File::open(path).context("cannot open a guest's memory");
            }
        }
        bail!("no guest memory in {folder}")
    }

    /// Masks the interrupts of a PCI network device: the driver no longer looks at its rings, and the device continues.
    pub fn take_interrupts(&mut self, interface: &str) -> Result<()> {
        // PCI 3.0 §6.2.2 (bit 10 of the command), §6.7 (capabilities), §6.8.2.3 (message control of MSI-X). MSI-X stays
        // enabled but masked, because QEMU does not tell the users of existing interrupts that it was disabled.
        self.check(&format!(
            "cd -P /sys/class/net/{interface}/device/.. && \
             byte() {{ dd if=config bs=1 skip=$1 count=1 2>/dev/null | od -An -tu1; }}; \
             write() {{ printf $2 | dd of=config bs=1 seek=$1 conv=notrunc 2>/dev/null; }}; \
             write 5 '\\004' && at=$(byte 52) && while [ $at -ne 0 ]; do \
             [ $(byte $at) -ne 17 ] || write $((at + 3)) '\\300'; at=$(byte $((at + 1))); done; cd /root"
        ))?;
        Ok(())
    }
}
