//! A Linux guest, run by QEMU or baton-vmm, and driven through its serial console.
//!
//! The console is the standard input and output of the program. Commands go to the root shell of
//! [`crate::images::guest_initramfs`]. Unique markers enclose the output of each command.

mod console;
mod qemu;
mod queues;
mod vmm;

use std::fs::File;
use std::io::Write;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use self::console::Console;
pub use self::qemu::{Accelerator, Qemu};
pub use self::queues::{Carried, QueuePair};
pub use self::vmm::Vmm;
use crate::{images, paths};

/// How long a guest may take to boot, and for each command. Long enough for the slowest machine.
pub const PATIENCE: Duration = Duration::from_secs(300);

/// The kernel parameters of every guest: only the shell writes to the console, and a panic ends the guest.
pub const KERNEL_COMMAND_LINE: &str = "console=ttyS0 quiet loglevel=1 panic=-1";

/// The line that `images/guest-init` prints before it starts the shell.
const UP: &str = "The guest is up.";

/// The prefixes of kernel messages about timekeeping, which only say that the machine is slow.
const TIMEKEEPING: [&str; 3] = ["hrtimer", "clocksource", "sched_clock"];

/// The maximum length of a command: a line of a terminal, minus the markers around the command.
const MAX_COMMAND: usize = 3900;

/// A guest. Its program is killed when this is dropped, and when the thread that started it ends.
#[derive(Debug)]
pub struct Guest {
    program: Child,
    input: ChildStdin,
    console: Console,
    name: String,
    logs: PathBuf,
    commands: u64,
}

/// The result of a command.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finished {
    /// Its exit code.
    pub status: i32,
    /// Its output.
    pub output: String,
}

impl Guest {
    /// Starts a program that runs a guest with its console on standard input and output. The logs of the test get the
    /// files `name.console`, and `name.log` for the standard error of the program.
    pub fn start(program: &Command, name: &str) -> Result<Self> {
        let logs = paths::test_logs()?;
        Self::start_with_logs(program, name, &logs)
    }

    /// Like [`Guest::start`], outside of tests: the files go to the directory `logs`.
    pub fn start_with_logs(program: &Command, name: &str, logs: &Path) -> Result<Self> {
        let what = program.get_program().to_string_lossy().into_owned();
        let log = File::create(logs.join(format!("{name}.log"))).context("cannot create a guest's log")?;
        let mut command = Command::new(images::found("setpriv")?);
        command.args(["--pdeathsig", "KILL"]).arg(program.get_program()).args(program.get_args());
        command.envs(program.get_envs().filter_map(|(name, value)| Some((name, value?))));
        let mut program = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(log)
            .spawn()
            .with_context(|| format!("cannot start {what}"))?;
        let (Some(input), Some(output)) = (program.stdin.take(), program.stdout.take()) else {
            bail!("no pipes to the standard input and output of {what}");
        };
        let console = Console::read(output, &logs.join(format!("{name}.console")))?;
        Ok(Self { program, input, console, name: name.to_owned(), logs: logs.to_owned(), commands: 0 })
    }

    /// Waits until the guest has booted and its shell accepts commands.
    pub fn wait_for_shell(&mut self) -> Result<()> {
        self.wait_for(UP)?;
        // Turns off the prompt, echo and line editing: from now on, each line is a command.
        self.type_line(r#"stty -echo; exec sh -c 'while IFS= read -r line; do eval "$line"; done'"#)?;
        self.check("true")?;
        Ok(())
    }

    /// Waits until `text` appears on the console, after any text that was waited for before.
    pub fn wait_for(&mut self, text: &str) -> Result<()> {
        let waited = self.console.wait_for(text, PATIENCE).map(drop);
        waited.map_err(|error| self.failed(error, &format!("{text:?} did not appear on the console")))
    }

    /// Runs a command without input, and waits until it ends.
    pub fn run(&mut self, command: &str) -> Result<Finished> {
        self.start_command(command)?;
        self.finish(command)
    }

    /// Runs a command that must succeed, and returns its output.
    pub fn check(&mut self, command: &str) -> Result<String> {
        let Finished { status, output } = self.run(command)?;
        if status != 0 {
            bail!("guest {}: {command:?} failed with exit code {status}: {output}", self.name);
        }
        Ok(output)
    }

    /// Pings `to` from the guest `count` times, and waits for every reply. `ping` waits for the last replies at most
    /// twice as long as for earlier ones, which is too short on an emulated machine.
    ///
    /// # Errors
    /// Returns an error if a reply is missing.
    pub fn check_pings(&mut self, to: Ipv4Addr, count: u16) -> Result<()> {
        let replies = "$(grep '^Icmp: [0-9]' /proc/net/snmp | cut -d ' ' -f 11)";
        let said = self.check(&format!(
            "all=$(({replies} + {count})); ping -q -A -W 30 -c {count} {to}; \
             for tick in $(seq 300); do [ {replies} -lt $all ] || break; sleep 0.1; done; \
             echo missing: $((all - {replies}))"
        ))?;
        let missing = said.lines().find_map(|line| line.strip_prefix("missing: ")?.parse::<i64>().ok());
        ensure!(missing.is_some_and(|missing| missing <= 0), "the guest lost pings: {said}");
        Ok(())
    }

    /// Checks that the guest's kernel has logged nothing since its log was last cleared, except about timekeeping.
    ///
    /// # Errors
    /// Returns an error if the log has other messages.
    pub fn check_dmesg(&mut self) -> Result<()> {
        let said = self.check("dmesg")?;
        let of_time = |line: &str| {
            let text = line.split_once("] ").map_or(line, |(_, text)| text);
            text.split_once(": ").is_some_and(|(part, _)| TIMEKEEPING.contains(&part))
        };
        let news: Vec<_> = said.lines().filter(|line| !of_time(line)).collect();
        ensure!(news.is_empty(), "the guest's kernel logged {news:?}");
        Ok(())
    }

    /// Returns what each queue pair of a virtio-net interface has carried since its driver was bound.
    ///
    /// # Errors
    /// Returns an error if `ethtool -S` fails in the guest.
    pub fn queue_pairs(&mut self, interface: &str) -> Result<Vec<QueuePair>> {
        queues::parse(&self.check(&format!("ethtool -S {interface}"))?)
    }

    /// Starts a command and returns at once. [`Guest::finish`] must be called before the next command.
    pub fn start_command(&mut self, command: &str) -> Result<()> {
        if command.contains('\n') || command.len() > MAX_COMMAND {
            bail!("the command has several lines or is too long: {command:?}");
        }
        self.commands += 1;
        let number = self.commands;
        // The quotes keep the markers out of the echo, in case echo is on.
        self.type_line(&format!(
            "echo BE''GIN-{number}; eval '{}' </dev/null; s=$?; echo; echo EN''D-{number}=$s=",
            command.replace('\'', r"'\''")
        ))
    }

    /// Waits until the command that was started last ends.
    pub fn finish(&mut self, command: &str) -> Result<Finished> {
        let number = self.commands;
        let result = self.hear(number);
        result.map_err(|error| self.failed(error, &format!("{command:?} did not end")))
    }

    fn hear(&mut self, number: u64) -> Result<Finished> {
        self.console.wait_for(&format!("BEGIN-{number}\r\n"), PATIENCE)?;
        let output = self.console.wait_for(&format!("\r\nEND-{number}="), PATIENCE)?;
        let status = self.console.wait_for("=", PATIENCE)?;
        let status = status.parse().with_context(|| format!("{status:?} is not an exit code"))?;
        Ok(Finished { status, output: output.replace("\r\n", "\n") })
    }

    /// Writes a line to the console.
    pub fn type_line(&mut self, line: &str) -> Result<()> {
        let typed = self.input.write_all(format!("{line}\n").as_bytes()).and_then(|()| self.input.flush());
        typed.map_err(|error| self.failed(error.into(), "cannot write to the console"))
    }

    /// Returns the whole output on the console.
    pub fn transcript(&self) -> String {
        self.console.transcript()
    }

    /// Returns the standard error of the program that runs the guest.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.log_path()).unwrap_or_default()
    }

    /// Returns the path of the file that [`Guest::log`] reads.
    pub fn log_path(&self) -> PathBuf {
        self.logs.join(format!("{}.log", self.name))
    }

    /// Returns the id of the process that runs the guest.
    pub fn process(&self) -> u32 {
        self.program.id()
    }

    /// Powers off the guest, and returns the exit status of the program that ran it.
    pub fn power_off(mut self) -> Result<ExitStatus> {
        self.type_line("poweroff -f")?;
        self.wait()
    }

    /// Waits until the program that runs the guest has ended.
    pub fn wait(mut self) -> Result<ExitStatus> {
        self.wait_end()
    }

    /// Like [`Self::wait`], but keeps the guest, for example to read its logs.
    pub fn wait_end(&mut self) -> Result<ExitStatus> {
        // The console ends when the process closes its standard output.
        let ended = self.console.wait_for_end(PATIENCE);
        ended.map_err(|error| self.failed(error, "the program did not end"))?;
        self.program.wait().context("cannot wait for a guest's program")
    }

    /// Adds to an error what failed, whether the program has ended, and the path of the console's log.
    fn failed(&mut self, error: anyhow::Error, what: &str) -> anyhow::Error {
        let ended = match self.program.try_wait() {
            Ok(Some(status)) => format!("; the program ended with {status}"),
            _ => String::new(),
        };
        let console = self.logs.join(format!("{}.console", self.name));
        error.context(format!("guest {}: {what}{ended}; see {}", self.name, console.display()))
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        // Both fail only if the program has already ended.
        let _ = self.program.kill();
        let _ = self.program.wait();
    }
}
