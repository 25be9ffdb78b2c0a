//! The agent: the first process of the lab's machine. It does one job at a time, and leaves nothing of it behind.

use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader, Read};
use std::path::PathBuf;
use std::process::{self, ChildStderr, ChildStdout, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use anyhow::{Context, Result, bail};
use nix::errno::Errno;
use nix::sys::reboot::{RebootMode, reboot};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::Pid;

use super::machine::PORT;
use super::message::{HEARTBEAT, Job, Order, Outcome, Report, Stream, send};

/// What the kernel loads for the tests, beyond what it loads by itself when asked for it.
const MODULES: [&str; 4] = ["kvm_amd", "tun", "vhost_net", "veth"];

/// Does what the supervisor orders until it is gone, then switches the machine off.
pub fn agent() -> Result<()> {
    if process::id() != 1 {
        bail!("only the lab's machine runs this, as its first process");
    }
    let result = serve();
    if let Err(error) = &result {
        // The console is kept.
        let _ = fs::write("/dev/console", format!("the lab's agent: {error:#}\n"));
    }
    reboot(RebootMode::RB_POWER_OFF).context("cannot switch the machine off")?;
    result
}

/// Where reports go, whole lines only.
type Port = Arc<Mutex<File>>;

fn serve() -> Result<()> {
    let status =
        Command::new("modprobe").arg("--all").args(MODULES).status().context("cannot run modprobe")?;
    if !status.success() {
        bail!("cannot load the modules {MODULES:?}");
    }
    let path = find_port()?;
    let orders =
        OpenOptions::new().read(true).write(true).open(&path).context("cannot open the supervisor's port")?;
    let port = Arc::new(Mutex::new(orders.try_clone().context("cannot share the port")?));
    report(&port, &Report::Ready);
    let heart = Arc::clone(&port);
    thread::spawn(move || {
        loop {
            thread::sleep(HEARTBEAT);
            report(&heart, &Report::Alive);
        }
    });
    // Also for a job that is ordered to end before it has a process.
    let to_end = Arc::new(AtomicBool::new(false));
    for line in BufReader::new(orders).lines() {
        match serde_json::from_str(&line.context("the supervisor is gone")?).context("a strange order")? {
            Order::Run(job) => {
                to_end.store(false, Ordering::SeqCst);
                let (port, to_end) = (Arc::clone(&port), Arc::clone(&to_end));
                thread::spawn(move || {
                    let outcome = run(&job, &port, &to_end);
                    report(&port, &Report::Ended(outcome));
                });
            }
            Order::End => {
                to_end.store(true, Ordering::SeqCst);
                kill_all();
            }
        }
    }
    Ok(())
}

/// The device of the port that has our name.
fn find_port() -> Result<PathBuf> {
    for entry in fs::read_dir("/sys/class/virtio-ports").context("there are no ports")? {
        let entry = entry.context("cannot list the ports")?;
        if fs::read_to_string(entry.path().join("name")).is_ok_and(|name| name.trim_end() == PORT) {
            return Ok(PathBuf::from("/dev").join(entry.file_name()));
        }
    }
    bail!("there is no port {PORT}")
}

fn run(job: &Job, port: &Port, to_end: &AtomicBool) -> Outcome {
    let spawned = job.command().stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
    let mut child = match spawned {
        Ok(child) => child,
        Err(error) => return Outcome::NotStarted(error.to_string()),
    };
    if to_end.load(Ordering::SeqCst) {
        kill_all();
    }
    let output: Option<ChildStdout> = child.stdout.take();
    let errors: Option<ChildStderr> = child.stderr.take();
    let pumps = [
        output.map(|output| pump(output, Stream::Output, port)),
        errors.map(|errors| pump(errors, Stream::Error, port)),
    ];
    let outcome = wait(i32::try_from(child.id()).map_or(Pid::from_raw(-1), Pid::from_raw));
    kill_all();
    while waitpid(None, None) != Err(Errno::ECHILD) {}
    // Nobody is left to hold the pipes open.
    for pump in pumps.into_iter().flatten() {
        let _ = pump.join();
    }
    outcome
}

/// Waits for the job's process, and meanwhile for every orphan, as a first process must.
fn wait(job: Pid) -> Outcome {
    loop {
        match waitpid(None, None) {
            Ok(WaitStatus::Exited(process, code)) if process == job => return Outcome::Exited(code),
            Ok(WaitStatus::Signaled(process, signal, _)) if process == job => {
                return Outcome::Killed(signal.as_str().to_owned());
            }
            Ok(_) | Err(Errno::EINTR) => (),
            Err(error) => return Outcome::NotStarted(format!("cannot wait for it: {error}")),
        }
    }
}

/// Ends every process but this one: the first process is spared.
fn kill_all() {
    // ESRCH: there was none.
    let _ = kill(Pid::from_raw(-1), Signal::SIGKILL);
}

/// Reports what is written to a pipe, a line at a time, until nobody can write to it any more.
fn pump(pipe: impl Read + Send + 'static, stream: Stream, port: &Port) -> thread::JoinHandle<()> {
    let port = Arc::clone(port);
    thread::spawn(move || {
        let mut pipe = BufReader::new(pipe);
        let mut line = Vec::new();
        while pipe.read_until(b'\n', &mut line).is_ok_and(|length| length > 0) {
            let text = String::from_utf8_lossy(&line).into_owned();
            report(&port, &Report::Output { stream, text });
            line.clear();
        }
    })
}

fn report(port: &Port, report: &Report) {
    let port = port.lock().unwrap_or_else(PoisonError::into_inner);
    // Without a supervisor the machine ends, as soon as the next order is read.
    let _ = send(&*port, report);
}
