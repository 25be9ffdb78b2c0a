//! A guest on baton-vmm.

use std::path::Path;
use std::process::Command;

use anyhow::Result;

use super::Guest;
use crate::faults::Faults;
use crate::{images, programs};

/// A baton-vmm to be started.
#[derive(Debug)]
pub struct Vmm {
    command: Command,
    parameters: String,
}

impl Vmm {
    /// Creates a baton-vmm with this number of vCPUs, this size of memory (as for `--memory`), and only a console.
    ///
    /// # Errors
    /// Returns an error if baton-vmm was not built, or the guest's images are missing.
    pub fn new(cpus: u16, memory: &str) -> Result<Self> {
        Self::with_kernel(&images::guest_vmlinux()?, cpus, memory)
    }

    /// Like [`Self::new`], with this kernel.
    ///
    /// # Errors
    /// Same as [`Self::new`].
    pub fn with_kernel(kernel: &Path, cpus: u16, memory: &str) -> Result<Self> {
        let mut command = Command::new(programs::vmm()?);
        command.arg("--kernel").arg(kernel).arg("--initrd").arg(images::guest_initramfs()?);
        command.args(["--cpus", &cpus.to_string(), "--memory", memory]);
        Ok(Self { command, parameters: "quiet loglevel=1".to_owned() })
    }

    /// Creates a baton-vmm that waits on this socket for a VM with this number of vCPUs and this size of memory.
    ///
    /// # Errors
    /// Same as [`Self::new`].
    pub fn incoming(socket: &Path, cpus: u16, memory: &str) -> Result<Self> {
        let mut command = Command::new(programs::vmm()?);
        command.arg("--incoming").arg(socket).args(["--cpus", &cpus.to_string(), "--memory", memory]);
        Ok(Self { command, parameters: String::new() })
    }

    /// Uses the build with fault points, if `faults` has any.
    ///
    /// # Errors
    /// Returns an error if that program was not built.
    pub fn with_faults(mut self, faults: &Faults) -> Result<Self> {
        if faults.any() {
            let mut command = Command::new(programs::faulty_vmm()?);
            command.args(self.command.get_args()).envs(faults.environment());
            self.command = command;
        }
        Ok(self)
    }

    /// Adds kernel parameters.
    #[must_use]
    pub fn parameters(mut self, parameters: &str) -> Self {
        self.parameters.push(' ');
        self.parameters.push_str(parameters);
        self
    }

    /// Adds options.
    #[must_use]
    pub fn args<'a>(mut self, arguments: impl IntoIterator<Item = &'a str>) -> Self {
        self.command.args(arguments);
        self
    }

    /// Adds a network device whose back-end listens on this socket.
    #[must_use]
    pub fn net(self, socket: &str, mac: &str, queue_pairs: u16) -> Self {
        self.args(["--net", &format!("socket={socket},mac={mac},queue-pairs={queue_pairs}")])
    }

    /// Adds a control socket at this path.
    #[must_use]
    pub fn control(self, path: &Path) -> Self {
        self.args([format!("--control-socket={}", path.display()).as_str()])
    }

    /// Returns the command line for display.
    pub fn command_line(&self) -> String {
        let words = self.command.get_args().map(|word| match word.to_string_lossy() {
            word if word.contains(' ') => format!("'{word}'"),
            word => word.into_owned(),
        });
        ["baton-vmm".to_owned()].into_iter().chain(words).collect::<Vec<_>>().join(" ")
    }

    /// Starts baton-vmm with [`Guest::start`].
    ///
    /// # Errors
    /// Returns an error if it cannot be started.
    pub fn start(mut self, name: &str) -> Result<Guest> {
        self.command.args(["--cmdline", &self.parameters]);
        Guest::start(&self.command, name)
    }

    /// Starts baton-vmm with [`Guest::start_with_logs`].
    ///
    /// # Errors
    /// Returns an error if it cannot be started.
    pub fn start_with_logs(self, name: &str, logs: &Path) -> Result<Guest> {
        Guest::start_with_logs(&self.command, name, logs)
    }
}
