//! The lab's machine: a QEMU that emulates a processor with hardware virtualization, and shares this machine's files
//! with it.

use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, bail};
use nix::fcntl::{FcntlArg, FdFlag, fcntl};

use super::clock::tsc_khz;
use crate::{images, paths, programs};

/// The name of the virtio port between the agent and the supervisor.
pub(super) const PORT: &str = "baton.agent";

/// The number of processors. One is enough; guests may have more. With two, races between QEMU's threads in its
/// emulation of SVM now and then reset or hang the machine.
const PROCESSORS: &str = "1";

/// Everything that QEMU can emulate, without two features that slow Linux down: a fifth level of page tables, which
/// costs twice under nested paging, and protection keys.
const PROCESSOR: &str = "max,-la57,-pku";

/// A QEMU process. It is killed when this is dropped, and when the thread that started it ends.
#[derive(Debug)]
pub(super) struct Machine {
    qemu: Child,
}

impl Machine {
    /// Starts the machine, and returns the connection to its agent. Its console output goes to a file in `logs` that
    /// begins with `name`.
    pub(super) fn start(logs: &Path, name: &str) -> Result<(Self, UnixStream)> {
        let (port, qemu_port) = UnixStream::pair().context("cannot create a socket pair")?;
        let qemu_port = OwnedFd::from(qemu_port);
        fcntl(&qemu_port, FcntlArg::F_SETFD(FdFlag::empty())).context("cannot make a socket inheritable")?;
        let errors =
            File::create(logs.join(format!("{name}-qemu.log"))).context("cannot create the log of QEMU")?;

        let mut command = Command::new(images::found("setpriv")?);
        command.args(["--pdeathsig", "KILL", "qemu-system-x86_64", "-nodefaults", "-no-user-config"]);
        command.args(["-display", "none", "-monitor", "none", "-no-reboot"]);
        command.args(["-accel", "tcg,thread=multi", "-cpu", PROCESSOR, "-smp", PROCESSORS, "-m", "5G"]);
        command.arg("-kernel").arg(images::lab_kernel()?).arg("-initrd").arg(images::lab_initramfs()?);
        command.arg("-append").arg(kernel_command_line(logs)?);
        command.arg("-serial").arg(option("file:", &logs.join(format!("{name}-console.log")))?);
        command.args(["-fsdev", "local,id=machine,path=/,security_model=none,readonly=on,multidevs=remap"]);
        command.args(["-device", "virtio-9p-pci,fsdev=machine,mount_tag=machine"]);
        command.arg("-fsdev").arg(option("local,id=logs,security_model=none,path=", logs)?);
        command.args(["-device", "virtio-9p-pci,fsdev=logs,mount_tag=logs"]);
        command.args(["-device", "virtio-serial-pci"]);
        command.arg("-chardev").arg(format!("socket,id=agent,fd={}", qemu_port.as_raw_fd()));
        command.args(["-device", &format!("virtserialport,chardev=agent,name={PORT}")]);
        let qemu = command
            .stdin(Stdio::null())
            .stdout(errors.try_clone().context("cannot duplicate the log of QEMU")?)
            .stderr(errors)
            .spawn()
            .context("cannot start qemu-system-x86_64")?;
        Ok((Self { qemu }, port))
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // Both fail only if QEMU has already ended.
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
    }
}

/// The parameters of the lab's kernel.
///
/// QEMU's emulation of SVM updates the word of pending interrupts without a lock. An interrupt can get lost when
/// another thread raises one at the same time, and nested guests then hang until the next interrupt. So the kernel uses
/// a periodic tick, which does not depend on the previous tick, and no optional features of SVM.
const KERNEL_PARAMETERS: &str =
    "console=ttyS0 quiet panic=-1 nohz=off highres=off kvm_amd.avic=0 kvm_amd.vgif=0 kvm_amd.vls=0";

fn kernel_command_line(logs: &Path) -> Result<String> {
    let agent = programs::lab()?;
    let modules = images::lab_modules()?;
    let mut line = format!("{KERNEL_PARAMETERS} tsc_early_khz={}", tsc_khz());
    for (name, path) in [("agent", agent.as_path()), ("modules", &modules), ("logs", logs)] {
        let path = path.to_str().filter(|path| !path.contains([' ', '"']));
        let Some(path) = path else {
            bail!("the lab cannot use {}: its path has a space or a quote", paths::target()?.display());
        };
        line.push_str(&format!(" lab.{name}={path}"));
    }
    Ok(line)
}

/// Returns an option of QEMU that ends with a path, in which commas are doubled.
fn option(start: &str, path: &Path) -> Result<String> {
    let path = path.to_str().with_context(|| format!("{} is not UTF-8", path.display()))?;
    Ok(format!("{start}{}", path.replace(',', ",,")))
}
