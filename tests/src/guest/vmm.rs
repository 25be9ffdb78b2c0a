//! A guest on baton-vmm.

use std::path::Path;
use std::process::Command;

use anyhow::Result;

use super::Guest;
use crate::faults::Faults;
use crate::{images, programs};

/// A baton-vmm about to be started.
#[derive(Debug)]
pub struct Vmm {
    command: Command,
    parameters: String,
}

impl Vmm {
    /// With these vCPUs and this memory (as its `--memory`), and no device but the console.
    ///
    /// # Errors
    /// If it was not built, or the guest's images are not there.
    pub fn new(cpus: u16, memory: &str) -> Result<Self> {
        Self::with_kernel(&images::guest_vmlinux()?, cpus, memory)
    }

    /// As [`Self::new`], with a kernel to choose.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn with_kernel(kernel: &Path, cpus: u16, memory: &str) -> Result<Self> {
        let mut command = Command::new(programs::vmm()?);
        command.arg("--kernel").arg(kernel).arg("--initrd").arg(images::guest_initramfs()?);
        command.args(["--cpus", &cpus.to_string(), "--memory", memory]);
        Ok(Self { command, parameters: "quiet loglevel=1".to_owned() })
    }

    /// Without a kernel: it waits on this socket for a VM of so many vCPUs and this memory to come.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn incoming(socket: &Path, cpus: u16, memory: &str) -> Result<Self> {
        let mut command = Command::new(programs::vmm()?);
        command.arg("--incoming").arg(socket).args(["--cpus", &cpus.to_string(), "--memory", memory]);
        Ok(Self { command, parameters: String::new() })
    }

    /// With fault points, if any are wanted.
    ///
    /// # Errors
    /// If it was not built.
    pub fn with_faults(mut self, faults: &Faults) -> Result<Self> {
        if faults.any() {
            let mut command = Command::new(programs::faulty_vmm()?);
            command.args(self.command.get_args()).envs(faults.environment());
            self.command = command;
        }
        Ok(self)
    }

    /// Further kernel parameters.
    #[must_use]
    pub fn parameters(mut self, parameters: &str) -> Self {
        self.parameters.push(' ');
        self.parameters.push_str(parameters);
        self
    }

    /// Further options.
    #[must_use]
    pub fn args<'a>(mut self, arguments: impl IntoIterator<Item = &'a str>) -> Self {
        self.command.args(arguments);
        self
    }

    /// A network device whose back-end listens on this socket.
    #[must_use]
    pub fn net(self, socket: &str, mac: &str, queue_pairs: u16) -> Self {
        self.args(["--net", &format!("socket={socket},mac={mac},queue-pairs={queue_pairs}")])
    }

    /// A control socket at this path.
    #[must_use]
    pub fn control(self, path: &Path) -> Self {
        self.args([format!("--control-socket={}", path.display()).as_str()])
    }

    /// The command line, for people.
    pub fn command_line(&self) -> String {
        let words = self.command.get_args().map(|word| match word.to_string_lossy() {
            word if word.contains(' ') => format!("'{word}'"),
            word => word.into_owned(),
        });
        ["baton-vmm".to_owned()].into_iter().chain(words).collect::<Vec<_>>().join(" ")
    }

    /// Starts it: [`Guest::start`].
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn start(mut self, name: &str) -> Result<Guest> {
        self.command.args(["--cmdline", &self.parameters]);
        Guest::start(&self.command, name)
    }

    /// Starts it: [`Guest::start_with_logs`].
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn start_with_logs(self, name: &str, logs: &Path) -> Result<Guest> {
        Guest::start_with_logs(&self.command, name, logs)
    }
}
