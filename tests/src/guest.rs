//! A Linux guest, whichever program runs it, driven through its serial console.
//!
//! The console is the program's standard input and output. Commands go to the root shell of
//! [`crate::images::guest_initramfs`]; markers which no command writes enclose what each of them writes.

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

/// How long a guest may take to boot, and each command: what is longer hangs, on the slowest of machines too.
pub const PATIENCE: Duration = Duration::from_secs(300);

/// What every guest's kernel is told: nothing but the shell is on the console, and a panic ends the guest.
pub const KERNEL_COMMAND_LINE: &str = "console=ttyS0 quiet loglevel=1 panic=-1";

/// What `images/guest-init` says when the shell is about to start.
const UP: &str = "The guest is up.";

/// The parts of a guest's kernel that keep time, as its messages begin. On a slow machine they complain, of nothing else.
const TIMEKEEPING: [&str; 3] = ["hrtimer", "clocksource", "sched_clock"];

/// The longest command: what a terminal takes as one line, less what goes around the command.
const MAX_COMMAND: usize = 3900;

/// A guest that runs or has run. Its program is ended when this is dropped, and with the thread that started it.
#[derive(Debug)]
pub struct Guest {
    program: Child,
    input: ChildStdin,
    console: Console,
    name: String,
    logs: PathBuf,
    commands: u64,
}

/// What a command did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finished {
    /// Its exit code.
    pub status: i32,
    /// What it has written.
    pub output: String,
}

impl Guest {
    /// Starts a program that runs a guest with its console on standard input and output. In the test's logs `name`
    /// gets a file for the console and one for what the program has to say.
    pub fn start(program: &Command, name: &str) -> Result<Self> {
        let logs = paths::test_logs()?;
        Self::start_with_logs(program, name, &logs)
    }

    /// As [`Guest::start`], for who is no test: the logs go to that folder.
    pub fn start_with_logs(program: &Command, name: &str, logs: &Path) -> Result<Self> {
        let what = program.get_program().to_string_lossy().into_owned();
        let log = File::create(logs.join(format!("{name}.log"))).context("cannot write a guest's log")?;
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
            bail!("{what} has no standard input or output");
        };
        let console = Console::read(output, &logs.join(format!("{name}.console")))?;
        Ok(Self { program, input, console, name: name.to_owned(), logs: logs.to_owned(), commands: 0 })
    }

    /// Waits until the guest has booted and its shell takes commands.
    pub fn wait_for_shell(&mut self) -> Result<()> {
        self.wait_for(UP)?;
        // From now on no prompt, no echo and no line editing: each line is a command.
        self.type_line(r#"stty -echo; exec sh -c 'while IFS= read -r line; do eval "$line"; done'"#)?;
        self.check("true")?;
        Ok(())
    }

    /// Waits until something is on the console that was not waited for before.
    pub fn wait_for(&mut self, text: &str) -> Result<()> {
        let waited = self.console.wait_for(text, PATIENCE).map(drop);
        waited.map_err(|error| self.failed(error, &format!("{text:?} was not said")))
    }

    /// Runs a command, and waits until it has ended. It has no input.
    pub fn run(&mut self, command: &str) -> Result<Finished> {
        self.start_command(command)?;
        self.finish(command)
    }

    /// Runs a command that must succeed, and returns what it has written.
    pub fn check(&mut self, command: &str) -> Result<String> {
        let Finished { status, output } = self.run(command)?;
        if status != 0 {
            bail!("the guest {}: {command:?} ended with {status}: {output}", self.name);
        }
        Ok(output)
    }

    /// Has it ping `to` so often, and waits for every reply: `ping` itself waits for the last ones no longer than twice as
    /// long as for those before, which on an emulated machine is too short.
    ///
    /// # Errors
    /// If one does not come.
    pub fn check_pings(&mut self, to: Ipv4Addr, count: u16) -> Result<()> {
        let replies = "$(grep '^Icmp: [0-9]' /proc/net/snmp | cut -d ' ' -f 11)";
        let said = self.check(&format!(
            "all=$(({replies} + {count})); ping -q -A -W 30 -c {count} {to}; \
             for tick in $(seq 300); do [ {replies} -lt $all ] || break; sleep 0.1; done; \
             echo missing: $((all - {replies}))"
        ))?;
        let missing = said.lines().find_map(|line| line.strip_prefix("missing: ")?.parse::<i64>().ok());
        ensure!(missing.is_some_and(|missing| missing <= 0), "the guest's pings were lost: {said}");
        Ok(())
    }

    /// That the guest's kernel has said nothing since its messages were last cleared, but that the machine is slow.
    ///
    /// # Errors
    /// If it has.
    pub fn check_dmesg(&mut self) -> Result<()> {
        let said = self.check("dmesg")?;
        let of_time = |line: &str| {
            let text = line.split_once("] ").map_or(line, |(_, text)| text);
            text.split_once(": ").is_some_and(|(part, _)| TIMEKEEPING.contains(&part))
        };
        let news: Vec<_> = said.lines().filter(|line| !of_time(line)).collect();
        ensure!(news.is_empty(), "the guest's kernel has said {news:?}");
        Ok(())
    }

    /// What each queue pair of a virtio-net interface has carried since its driver was bound.
    ///
    /// # Errors
    /// If the guest cannot tell.
    pub fn queue_pairs(&mut self, interface: &str) -> Result<Vec<QueuePair>> {
        queues::parse(&self.check(&format!("ethtool -S {interface}"))?)
    }

    /// Has a command run while the caller does something else. Until [`Guest::finish`] there can be no other.
    pub fn start_command(&mut self, command: &str) -> Result<()> {
        if command.contains('\n') || command.len() > MAX_COMMAND {
            bail!("not a command of one line: {command:?}");
        }
        self.commands += 1;
        let number = self.commands;
        // The quotes keep the markers out of an echo, should there be one.
        self.type_line(&format!(
            "echo BE''GIN-{number}; eval '{}' </dev/null; s=$?; echo; echo EN''D-{number}=$s=",
            command.replace('\'', r"'\''")
        ))
    }

    /// Waits for the end of the command that was started last.
    pub fn finish(&mut self, command: &str) -> Result<Finished> {
        let number = self.commands;
        let result = self.hear(number);
        result.map_err(|error| self.failed(error, &format!("{command:?} did not end")))
    }

    fn hear(&mut self, number: u64) -> Result<Finished> {
        self.console.wait_for(&format!("BEGIN-{number}\r\n"), PATIENCE)?;
        let output = self.console.wait_for(&format!("\r\nEND-{number}="), PATIENCE)?;
        let status = self.console.wait_for("=", PATIENCE)?;
        let status = status.parse().with_context(|| format!("{status:?} is no exit code"))?;
        Ok(Finished { status, output: output.replace("\r\n", "\n") })
    }

    /// Writes a line on the console.
    pub fn type_line(&mut self, line: &str) -> Result<()> {
        let typed = self.input.write_all(format!("{line}\n").as_bytes()).and_then(|()| self.input.flush());
        typed.map_err(|error| self.failed(error.into(), "no input is taken"))
    }

    /// All that has been on the console.
    pub fn transcript(&self) -> String {
        self.console.transcript()
    }

    /// What the program that runs the guest has said.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.log_path()).unwrap_or_default()
    }

    /// Where that is kept.
    pub fn log_path(&self) -> PathBuf {
        self.logs.join(format!("{}.log", self.name))
    }

    /// The process that runs the guest.
    pub fn process(&self) -> u32 {
        self.program.id()
    }

    /// Switches the guest off, and returns how the program that ran it ended.
    pub fn power_off(mut self) -> Result<ExitStatus> {
        self.type_line("poweroff -f")?;
        self.wait()
    }

    /// Waits until the program that runs the guest has ended.
    pub fn wait(mut self) -> Result<ExitStatus> {
        self.wait_end()
    }

    /// As [`Self::wait`], for who looks at it afterwards.
    pub fn wait_end(&mut self) -> Result<ExitStatus> {
        // Standard output is closed by the end of the process.
        let ended = self.console.wait_for_end(PATIENCE);
        ended.map_err(|error| self.failed(error, "it did not end"))?;
        self.program.wait().context("cannot wait for a guest's program")
    }

    /// Says what went wrong, what became of the program, and where to read on.
    fn failed(&mut self, error: anyhow::Error, what: &str) -> anyhow::Error {
        let ended = match self.program.try_wait() {
            Ok(Some(status)) => format!("; its program ended with {status}"),
            _ => String::new(),
        };
        let console = self.logs.join(format!("{}.console", self.name));
        error.context(format!("the guest {}: {what}{ended}; see {}", self.name, console.display()))
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        // Both fail only if it has ended already.
        let _ = self.program.kill();
        let _ = self.program.wait();
    }
}
