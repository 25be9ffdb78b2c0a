//! A program under test: started with inherited descriptors, its log kept, and gone with the test.
//!
//! It is in the network namespace of the thread that starts it, and is killed when that thread ends in any way.
#![expect(
    unsafe_code,
    reason = "a child's descriptors and its death with its parent are arranged before exec"
)]

use std::ffi::OsString;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::Signal;
use rustix::process::{Resource, Rlimit, getrlimit, prlimit};

use crate::jitter::Jitter;
use crate::programs;

/// How long anything may take. Only catches what hangs.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// Held from a fork until its exec, and where a descriptor must not be in a child for even that long: tests of one
/// process run in many threads.
pub(crate) static FORKING: Mutex<()> = Mutex::new(());

/// How often is looked where the kernel reports no event.
const TICK: Duration = Duration::from_millis(1);

/// Waits until a condition comes true of which nobody tells; twice as long as for other things, for in the lab much may
/// be part of it.
///
/// # Errors
/// If it does not, and the condition's own.
pub fn until(what: &str, mut condition: impl FnMut() -> Result<bool>) -> Result<()> {
    let deadline = Instant::now() + 2 * PATIENCE;
    while !condition()? {
        ensure!(Instant::now() < deadline, "waited in vain until {what}");
        thread::sleep(TICK);
    }
    Ok(())
}

/// Sends a signal to the process of a descriptor.
pub(crate) fn send(process: BorrowedFd<'_>, signal: Signal) -> Result<(), Errno> {
    // SAFETY: takes numbers, and a null pointer for "no more information".
    let result = unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            process.as_raw_fd(),
            signal as libc::c_int,
            std::ptr::null::<()>(),
            0,
        )
    };
    Errno::result(result).map(drop)
}

/// A running program.
#[derive(Debug)]
pub struct Process {
    child: Child,
    pidfd: OwnedFd,
    log: std::fs::File,
    status: Option<ExitStatus>,
    jitter: Option<Jitter>,
}

impl Process {
    /// Starts `path`. The child inherits `fds` under their numbers here, and no others.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn start(path: &Path, arguments: &[OsString], fds: &[BorrowedFd<'_>]) -> Result<Self> {
        Self::start_with_input(path, arguments, fds, Stdio::null())
    }

    /// The same with something on its standard input.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn start_with_input(
        path: &Path,
        arguments: &[OsString],
        fds: &[BorrowedFd<'_>],
        input: Stdio,
    ) -> Result<Self> {
        let log = tempfile::tempfile().context("a file for the log")?;
        let fds: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
        let parent = nix::unistd::getpid();
        let mut command = Command::new(path);
        command.args(arguments).stdin(input).stdout(Stdio::null()).stderr(log.try_clone()?);
        let before_exec = move || {
            nix::sys::prctl::set_pdeathsig(Signal::SIGKILL)?;
            if nix::unistd::getppid() != parent {
                return Err(Errno::ESRCH.into());
            }
            for &fd in &fds {
                // SAFETY: takes numbers only; the descriptor is the parent's, which keeps it open until the exec.
                Errno::result(unsafe { libc::fcntl(fd, libc::F_SETFD, 0) })?;
            }
            Ok(())
        };
        // SAFETY: the closure only makes system calls.
        unsafe { command.pre_exec(before_exec) };
        let forking = FORKING.lock().unwrap_or_else(PoisonError::into_inner);
        let child = command.spawn().with_context(|| format!("start {}", path.display()))?;
        drop(forking);
        let pid = libc::pid_t::try_from(child.id())?;
        // SAFETY: takes numbers only. The child has not been waited for, so the number is still its own.
        let pidfd = Errno::result(unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) })?;
        // SAFETY: the descriptor was just created and belongs to nobody else.
        let pidfd = unsafe { OwnedFd::from_raw_fd(RawFd::try_from(pidfd)?) };
        // It may be started by another program, which it then replaces. Those with fault points stop by themselves, and a
        // test waits for that.
        let is_backend = programs::backend()
            .is_ok_and(|backend| path == backend || arguments.iter().any(|argument| *argument == backend));
        let jitter = if is_backend { Jitter::of(pidfd.as_fd())? } else { None };
        Ok(Self { child, pidfd, log, status: None, jitter })
    }

    /// Its process descriptor.
    #[cfg(test)]
    pub(crate) fn pidfd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }

    /// Its process number.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What it has said on its standard error so far.
    pub fn log(&self) -> String {
        // Read at offsets of its own: the file's belongs to the child, which writes there.
        let mut bytes = Vec::new();
        let mut chunk = [0; 4096];
        loop {
            match self.log.read_at(&mut chunk, bytes.len() as u64) {
                Ok(0) => return String::from_utf8_lossy(&bytes).into_owned(),
                Ok(count) => bytes.extend_from_slice(&chunk[..count]),
                Err(error) => return format!("(the log cannot be read: {error})"),
            }
        }
    }

    /// Waits for up to `time` for its end.
    fn ends_within(&mut self, time: Duration) -> Result<bool> {
        if self.status.is_none() {
            let mut fds = [PollFd::new(self.pidfd.as_fd(), PollFlags::POLLIN)];
            if poll(&mut fds, PollTimeout::try_from(time)?)? == 0 {
                return Ok(false);
            }
            self.status = Some(self.child.wait()?);
        }
        Ok(true)
    }

    /// Whether it still runs.
    ///
    /// # Errors
    /// The system's.
    pub fn is_running(&mut self) -> Result<bool> {
        Ok(!self.ends_within(Duration::ZERO)?)
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// If it goes on.
    pub fn wait(&mut self) -> Result<ExitStatus> {
        ensure!(self.ends_within(PATIENCE)?, "process {} does not end", self.pid());
        self.status.context("an ended process has a status")
    }

    /// Sends it a signal.
    ///
    /// # Errors
    /// If it has ended.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        ensure!(self.status.is_none(), "process {} has ended", self.pid());
        let mut stopped = self.jitter.as_ref().map(Jitter::hold);
        send(self.pidfd.as_fd(), signal).with_context(|| format!("send {signal}"))?;
        if let Some(stopped) = &mut stopped
            && let Signal::SIGSTOP | Signal::SIGCONT = signal
        {
            **stopped = signal == Signal::SIGSTOP;
        }
        Ok(())
    }

    /// Waits until `condition` gives something, for as long as the process runs.
    ///
    /// # Errors
    /// If it ends, or the condition does not come true; the condition's own.
    pub fn wait_until<T>(
        &mut self,
        what: &str,
        mut condition: impl FnMut(&Self) -> Result<Option<T>>,
    ) -> Result<T> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(value) = condition(self)? {
                return Ok(value);
            }
            if self.ends_within(TICK)? {
                bail!("the process ended ({:?}) before {what}; its log:\n{}", self.status, self.log());
            }
            ensure!(Instant::now() < deadline, "waited in vain until {what}");
        }
    }

    /// Connects to a socket on which it will listen soon.
    ///
    /// # Errors
    /// If it does not.
    pub fn connect(&mut self, path: &Path) -> Result<UnixStream> {
        self.wait_until(&format!("it listened on {}", path.display()), |_| Ok(UnixStream::connect(path).ok()))
    }

    /// How many descriptors it has open.
    ///
    /// # Errors
    /// If it has ended.
    pub fn open_fds(&self) -> Result<usize> {
        open_fds(self.pid())
    }

    /// How many threads it has.
    ///
    /// # Errors
    /// If it has ended.
    pub fn threads(&self) -> Result<usize> {
        Ok(std::fs::read_dir(format!("/proc/{}/task", self.pid()))?.count())
    }

    /// Where its descriptors point, for the message of a failed test.
    ///
    /// # Errors
    /// If it has ended.
    pub fn fd_targets(&self) -> Result<Vec<String>> {
        targets(self.pid())
    }

    /// Waits until it has exactly this many descriptors open.
    ///
    /// # Errors
    /// If it never has.
    pub fn wait_open_fds(&mut self, expected: usize) -> Result<()> {
        let what = format!("it had {expected} descriptors open");
        let result = self.wait_until(&what, |process| Ok((process.open_fds()? == expected).then_some(())));
        result.with_context(|| format!("open: {:#?}", self.fd_targets().unwrap_or_default()))
    }

    /// How many bytes of its own memory (not shared with the guest) it has in RAM.
    ///
    /// # Errors
    /// If it has ended.
    pub fn resident_bytes(&self) -> Result<u64> {
        let text = std::fs::read_to_string(format!("/proc/{}/status", self.pid()))?;
        let line = text.lines().find_map(|line| line.strip_prefix("RssAnon:")).context("no RssAnon")?;
        let kibibytes: u64 = line.trim().trim_end_matches(" kB").parse().context("RssAnon")?;
        Ok(kibibytes * 1024)
    }
}

/// Whether a process is stopped.
///
/// # Errors
/// If there is no such process.
pub fn is_stopped(process: u32) -> Result<bool> {
    let stat = std::fs::read_to_string(format!("/proc/{process}/stat"))?;
    // After the program's name, which is in parentheses.
    Ok(stat.rsplit_once(')').is_some_and(|(_, fields)| fields.trim_start().starts_with('T')))
}

/// How many descriptors a process has open.
///
/// # Errors
/// If it has ended.
pub fn open_fds(process: u32) -> Result<usize> {
    Ok(std::fs::read_dir(format!("/proc/{process}/fd"))?.count())
}

/// The sockets that a process has, by names that no other sockets ever have.
///
/// # Errors
/// If it has ended.
pub fn sockets_of(process: u32) -> Result<Vec<String>> {
    let mut sockets = targets(process)?;
    sockets.retain(|target| target.starts_with("socket:"));
    Ok(sockets)
}

/// Where the descriptors of a process point.
fn targets(process: u32) -> Result<Vec<String>> {
    let mut targets = Vec::new();
    for entry in std::fs::read_dir(format!("/proc/{process}/fd"))? {
        // One that has been closed since is no target.
        if let Ok(target) = std::fs::read_link(entry?.path()) {
            targets.push(target.display().to_string());
        }
    }
    targets.sort();
    Ok(targets)
}

/// Lets a process have descriptors below this number only, or as many as this one may have.
///
/// # Errors
/// If it has ended.
pub fn limit_descriptors(process: u32, below: Option<u64>) -> Result<()> {
    let process = rustix::process::Pid::from_raw(i32::try_from(process)?);
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    prlimit(process, Resource::Nofile, Rlimit { current: below.or(maximum), maximum })?;
    Ok(())
}

impl Drop for Process {
    fn drop(&mut self) {
        if self.status.is_none() {
            // Nothing that fails here can be helped: it dies with this thread in any case.
            let _ = self.signal(Signal::SIGKILL);
            let _ = self.child.wait();
        }
        if thread::panicking() {
            eprintln!("--- log of process {} ---\n{}--- end ---", self.pid(), self.log());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str, fds: &[BorrowedFd<'_>]) -> Process {
        Process::start(Path::new("/bin/sh"), &["-c".into(), script.into()], fds).unwrap()
    }

    #[test]
    fn a_program_leaves_its_log_and_its_status() {
        let mut process = shell("echo hello >&2; exit 3", &[]);
        assert_eq!(process.wait().unwrap().code(), Some(3));
        assert_eq!(process.log(), "hello\n");
        assert!(!process.is_running().unwrap());
    }

    #[test]
    fn a_program_is_killed_with_its_handle() {
        let process = shell("exec sleep 1000", &[]);
        let pid = process.pid();
        assert!(Path::new(&format!("/proc/{pid}")).exists());
        drop(process);
        assert!(!Path::new(&format!("/proc/{pid}")).exists());
    }

    #[test]
    fn descriptors_are_inherited_when_named() {
        let (reader, writer) = nix::unistd::pipe().unwrap();
        let mut process = shell(&format!("echo hi >&{}", writer.as_raw_fd()), &[writer.as_fd()]);
        process.wait().unwrap();
        let mut bytes = [0; 10];
        assert_eq!(nix::unistd::read(&reader, &mut bytes).unwrap(), 3);
    }

    #[test]
    fn an_early_end_is_not_waited_out() {
        let mut process = shell("echo broken >&2; exit 1", &[]);
        let error = process.connect(Path::new("/nonexistent")).unwrap_err();
        assert!(error.to_string().contains("broken"), "{error}");
    }
}
