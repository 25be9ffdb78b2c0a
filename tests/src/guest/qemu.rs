//! A guest on QEMU: under KVM in the lab, emulated anywhere.

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

/// The kind of QEMU's memory objects used here, and the name that it gives to their files.
const MEMORY: &str = "memory-backend-memfd";

/// What runs the guest's instructions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Accelerator {
    /// The processor.
    Kvm,
    /// QEMU itself.
    Tcg,
}

impl Accelerator {
    /// The one for tests with that datapath: the emulation, which is there without the lab, but for the kernel's
    /// datapath, which needs the lab anyhow.
    pub fn with(datapath: Datapath) -> Self {
        match datapath {
            Datapath::Userspace => Self::Tcg,
            Datapath::VhostNet => Self::Kvm,
        }
    }
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
        let object = format!("{MEMORY},id=memory,size={memory},share=on");
        Self::with_memory(accelerator, cpus, memory, &object)
    }

    /// The same with its memory in a file, which another QEMU can have, too.
    pub fn in_file(accelerator: Accelerator, cpus: u16, memory: &str, file: &Path) -> Result<Self> {
        let file = file.to_str().context("a path that is not UTF-8")?.replace(',', ",,");
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

    /// Starts it, with a monitor.
    pub fn start_with_monitor(mut self, name: &str) -> Result<(Guest, Qmp)> {
        let (ours, qemus) = UnixStream::pair().context("cannot make a pair of sockets")?;
        let qemus = OwnedFd::from(qemus);
        fcntl(&qemus, FcntlArg::F_SETFD(FdFlag::empty())).context("cannot pass a socket on")?;
        self.command.arg("-chardev").arg(format!("socket,id=monitor,fd={}", qemus.as_raw_fd()));
        self.command.args(["-mon", "chardev=monitor,mode=control"]);
        let guest = self.start(name)?;
        // Its end is noticed only if nobody else has its socket.
        drop(qemus);
        let monitor = Qmp::new(ours).with_context(|| format!("the monitor of {name}: {}", guest.log()))?;
        Ok((guest, monitor))
    }

    /// Has it start the guest anew when that reboots, rather than end.
    pub fn rebooting(self) -> Self {
        self.args(["-action", "reboot=reset"])
    }

    /// Has it wait for a guest that comes from elsewhere, and not let it run by itself either.
    pub fn incoming(self) -> Self {
        self.args(["-incoming", "defer", "-S"])
    }
}

impl Guest {
    /// The memory of a guest that QEMU runs, as the process has it.
    pub fn memory(&self) -> Result<File> {
        let folder = format!("/proc/{}/fd", self.process());
        for entry in fs::read_dir(&folder).with_context(|| folder.clone())? {
            let path = entry?.path();
            // One that has been closed since is not it.
            if fs::read_link(&path).is_ok_and(|target| target.to_string_lossy().contains(MEMORY)) {
                return File::open(path).context("cannot open a guest's memory");
            }
        }
        bail!("{folder} has no guest's memory")
    }

    /// Takes the interrupts from a PCI network device: its driver looks at no ring from now on, while the device goes
    /// on as before.
    pub fn take_interrupts(&mut self, interface: &str) -> Result<()> {
        // PCI 3.0 §6.2.2 (bit 10 of the command), §6.7 (capabilities), §6.8.2.3 (MSI-X' message control: on, but masked;
        // that it is off QEMU tells nobody who has an interrupt already).
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
