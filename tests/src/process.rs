//! A process that runs a program under test, with inherited descriptors and a captured log.
//!
//! It runs in the network namespace of the thread that starts it, and is killed when that thread ends for any reason.
#![expect(unsafe_code, reason = "sets up a child's descriptors and parent-death signal before exec")]

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

/// The timeout of all waits. Only catches hangs.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// Held from fork to exec, and by a thread with a descriptor that a child must not inherit even until its exec. The
/// tests of one process run in several threads.
pub(crate) static FORKING: Mutex<()> = Mutex::new(());

/// How often to check a condition for which the kernel reports no event.
const TICK: Duration = Duration::from_millis(1);

/// Polls until `condition` is true, for up to twice [`PATIENCE`]: in the lab, a condition may involve many steps.
///
/// # Errors
/// Returns an error if the condition does not become true in time, or fails.
pub fn until(what: &str, mut condition: impl FnMut() -> Result<bool>) -> Result<()> {
    let deadline = Instant::now() + 2 * PATIENCE;
    while !condition()? {
        ensure!(Instant::now() < deadline, "timed out before {what}");
        thread::sleep(TICK);
    }
    Ok(())
}

/// Sends a signal to the process of a pidfd.
pub(crate) fn send(process: BorrowedFd<'_>, signal: Signal) -> Result<(), Errno> {
    // SAFETY: takes only numbers and a null pointer, which requests the default signal information.
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
    /// Starts the program `path`. The child inherits only `fds`, under the same numbers.
    ///
    /// # Errors
    /// Returns an error if it cannot be started.
    pub fn start(path: &Path, arguments: &[OsString], fds: &[BorrowedFd<'_>]) -> Result<Self> {
        Self::start_with_input(path, arguments, fds, Stdio::null())
    }

    /// Like [`Self::start`], with this standard input.
    ///
    /// # Errors
    /// Returns an error if it cannot be started.
    pub fn start_with_input(
        path: &Path,
        arguments: &[OsString],
        fds: &[BorrowedFd<'_>],
        input: Stdio,
    ) -> Result<Self> {
        let log = tempfile::tempfile().context("cannot create a file for the log")?;
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
                // SAFETY: takes only numbers. The caller keeps the descriptor open until the exec.
                Errno::result(unsafe { libc::fcntl(fd, libc::F_SETFD, 0) })?;
            }
            Ok(())
        };
        // SAFETY: the closure only makes system calls.
        unsafe { command.pre_exec(before_exec) };
        let forking = FORKING.lock().unwrap_or_else(PoisonError::into_inner);
        let child = command.spawn().with_context(|| format!("cannot start {}", path.display()))?;
        drop(forking);
        let pid = libc::pid_t::try_from(child.id())?;
        // SAFETY: takes only numbers. The child has not been waited for, so its process id is not reused.
        let pidfd = Errno::result(unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) })?;
        // SAFETY: the descriptor was just created, and nothing else owns it.
        let pidfd = unsafe { OwnedFd::from_raw_fd(RawFd::try_from(pidfd)?) };
        // Another program may start the back-end by exec, with its path as an argument. The back-end with fault points
        // is excluded: it may stop itself, and a test waits for that.
        let is_backend = programs::backend()
            .is_ok_and(|backend| path == backend || arguments.iter().any(|argument| *argument == backend));
        let jitter = if is_backend { Jitter::of(pidfd.as_fd())? } else { None };
        Ok(Self { child, pidfd, log, status: None, jitter })
    }

    /// Returns its pidfd.
    #[cfg(test)]
    pub(crate) fn pidfd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }

    /// Returns its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Returns its standard error so far.
    pub fn log(&self) -> String {
        // Reads at explicit offsets, because the child writes at the shared file offset.
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

    /// Waits up to `time` for its end. Returns whether it has ended.
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

    /// Returns whether it still runs.
    ///
    /// # Errors
    /// Returns an error if a system call fails.
    pub fn is_running(&mut self) -> Result<bool> {
        Ok(!self.ends_within(Duration::ZERO)?)
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// Returns an error if it does not end in time.
    pub fn wait(&mut self) -> Result<ExitStatus> {
        ensure!(self.ends_within(PATIENCE)?, "process {} does not end", self.pid());
        self.status.context("the process has ended without a status")
    }

    /// Sends it a signal.
    ///
    /// # Errors
    /// Returns an error if it has ended.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        ensure!(self.status.is_none(), "process {} has ended", self.pid());
        let mut stopped = self.jitter.as_ref().map(Jitter::hold);
        send(self.pidfd.as_fd(), signal).with_context(|| format!("cannot send {signal}"))?;
        if let Some(stopped) = &mut stopped
            && let Signal::SIGSTOP | Signal::SIGCONT = signal
        {
            **stopped = signal == Signal::SIGSTOP;
        }
        Ok(())
    }

    /// Polls until `condition` returns a value, as long as the process runs.
    ///
    /// # Errors
    /// Returns an error if the process ends, or if the condition fails or returns no value in time.
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
            ensure!(Instant::now() < deadline, "timed out before {what}");
        }
    }

    /// Waits until it listens on a socket, and connects.
    ///
    /// # Errors
    /// Returns an error if it does not listen in time.
    pub fn connect(&mut self, path: &Path) -> Result<UnixStream> {
        self.wait_until(&format!("it listened on {}", path.display()), |_| Ok(UnixStream::connect(path).ok()))
    }

    /// Returns how many descriptors it has open.
    ///
    /// # Errors
    /// Returns an error if it has ended.
    pub fn open_fds(&self) -> Result<usize> {
        open_fds(self.pid())
    }

    /// Returns how many threads it has.
    ///
    /// # Errors
    /// Returns an error if it has ended.
    pub fn threads(&self) -> Result<usize> {
        Ok(std::fs::read_dir(format!("/proc/{}/task", self.pid()))?.count())
    }

    /// Returns the files that its descriptors refer to, for the message of a failed test.
    ///
    /// # Errors
    /// Returns an error if it has ended.
    pub fn fd_targets(&self) -> Result<Vec<String>> {
        targets(self.pid())
    }

    /// Waits until it has exactly `expected` descriptors open.
    ///
    /// # Errors
    /// Returns an error if that does not happen in time.
    pub fn wait_open_fds(&mut self, expected: usize) -> Result<()> {
        let what = format!("it had {expected} descriptors open");
        let result = self.wait_until(&what, |process| Ok((process.open_fds()? == expected).then_some(())));
        result.with_context(|| format!("open descriptors: {:#?}", self.fd_targets().unwrap_or_default()))
    }

    /// Returns the resident size of its anonymous memory in bytes, which excludes guest memory.
    ///
    /// # Errors
    /// Returns an error if it has ended.
    pub fn resident_bytes(&self) -> Result<u64> {
        let text = std::fs::read_to_string(format!("/proc/{}/status", self.pid()))?;
        let line = text.lines().find_map(|line| line.strip_prefix("RssAnon:")).context("no RssAnon")?;
        let kibibytes: u64 = line.trim().trim_end_matches(" kB").parse().context("RssAnon")?;
        Ok(kibibytes * 1024)
    }
}

/// Returns whether a process is stopped.
///
/// # Errors
/// Returns an error if the process does not exist.
pub fn is_stopped(process: u32) -> Result<bool> {
    let stat = std::fs::read_to_string(format!("/proc/{process}/stat"))?;
    // The state follows the name of the program, which is in parentheses.
    Ok(stat.rsplit_once(')').is_some_and(|(_, fields)| fields.trim_start().starts_with('T')))
}

/// Returns how many descriptors a process has open, without io_uring instances: a worker's thread creates one after
/// some batches and keeps it, as it keeps itself.
///
/// # Errors
/// Returns an error if it has ended, or has more io_uring instances than threads.
pub fn open_fds(process: u32) -> Result<usize> {
    let (instances, others): (Vec<_>, Vec<_>) =
        targets(process)?.into_iter().partition(|target| target.contains("[io_uring]"));
    let threads = std::fs::read_dir(format!("/proc/{process}/task"))?.count();
    ensure!(instances.len() < threads, "{} io_uring instances, {threads} threads", instances.len());
    Ok(others.len())
}

/// Returns the open sockets of a process, by names that are never reused.
///
/// # Errors
/// Returns an error if it has ended.
pub fn sockets_of(process: u32) -> Result<Vec<String>> {
    let mut sockets = targets(process)?;
    sockets.retain(|target| target.starts_with("socket:"));
    Ok(sockets)
}

/// Returns the files that the descriptors of a process refer to.
fn targets(process: u32) -> Result<Vec<String>> {
    let mut targets = Vec::new();
    for entry in std::fs::read_dir(format!("/proc/{process}/fd"))? {
        // Fails for a descriptor that was closed in the meantime.
        if let Ok(target) = std::fs::read_link(entry?.path()) {
            targets.push(target.display().to_string());
        }
    }
    targets.sort();
    Ok(targets)
}

/// Limits the descriptors of a process to numbers below `below`. `None` sets the maximum that this process may have.
///
/// # Errors
/// Returns an error if it has ended.
pub fn limit_descriptors(process: u32, below: Option<u64>) -> Result<()> {
    let process = rustix::process::Pid::from_raw(i32::try_from(process)?);
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    prlimit(process, Resource::Nofile, Rlimit { current: below.or(maximum), maximum })?;
    Ok(())
}

impl Drop for Process {
    fn drop(&mut self) {
        if self.status.is_none() {
            // Errors are ignored: the process dies with this thread in any case.
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
    fn the_log_and_the_status_of_a_program_are_kept() {
        let mut process = shell("echo hello >&2; exit 3", &[]);
        assert_eq!(process.wait().unwrap().code(), Some(3));
        assert_eq!(process.log(), "hello\n");
        assert!(!process.is_running().unwrap());
    }

    #[test]
    fn dropping_the_handle_kills_the_program() {
        let process = shell("exec sleep 1000", &[]);
        let pid = process.pid();
        assert!(Path::new(&format!("/proc/{pid}")).exists());
        drop(process);
        assert!(!Path::new(&format!("/proc/{pid}")).exists());
    }

    #[test]
    fn named_descriptors_are_inherited() {
        let (reader, writer) = nix::unistd::pipe().unwrap();
        let mut process = shell(&format!("echo hi >&{}", writer.as_raw_fd()), &[writer.as_fd()]);
        process.wait().unwrap();
        let mut bytes = [0; 10];
        assert_eq!(nix::unistd::read(&reader, &mut bytes).unwrap(), 3);
    }

    #[test]
    fn waiting_fails_as_soon_as_the_program_ends() {
        let mut process = shell("echo broken >&2; exit 1", &[]);
        let error = process.connect(Path::new("/nonexistent")).unwrap_err();
        assert!(error.to_string().contains("broken"), "{error}");
    }
}
