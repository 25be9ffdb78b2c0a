//! The agent: the first process of the lab's machine. It runs one job at a time, and kills all processes of a job that
//! has ended.

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

/// The kernel modules that the tests need and that the kernel does not load on demand.
const MODULES: [&str; 4] = ["kvm_amd", "tun", "vhost_net", "veth"];

/// Serves the supervisor until the supervisor ends, then powers off the machine.
pub fn agent() -> Result<()> {
    if process::id() != 1 {
        bail!("the agent must be the first process of the lab's machine");
    }
    let result = serve();
    if let Err(error) = &result {
        // The output of the console is kept in the lab's logs.
        let _ = fs::write("/dev/console", format!("the lab's agent: {error:#}\n"));
    }
    reboot(RebootMode::RB_POWER_OFF).context("cannot power off the machine")?;
    result
}

/// The port to the supervisor. The lock keeps the lines of different threads apart.
type Port = Arc<Mutex<File>>;

fn serve() -> Result<()> {
    let status =
        Command::new("modprobe").arg("--all").args(MODULES).status().context("cannot run modprobe")?;
    if !status.success() {
        bail!("cannot load the kernel modules {MODULES:?}");
    }
    let path = find_port()?;
    let orders =
        OpenOptions::new().read(true).write(true).open(&path).context("cannot open the supervisor's port")?;
    let port = Arc::new(Mutex::new(orders.try_clone().context("cannot duplicate the port")?));
    report(&port, &Report::Ready);
    let heart = Arc::clone(&port);
    thread::spawn(move || {
        loop {
            thread::sleep(HEARTBEAT);
            report(&heart, &Report::Alive);
        }
    });
    // Ends a job whose process has not been created yet.
    let to_end = Arc::new(AtomicBool::new(false));
    for line in BufReader::new(orders).lines() {
        match serde_json::from_str(&line.context("cannot read from the supervisor")?)
            .context("invalid order")?
        {
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

/// Finds the device of the port named [`PORT`].
fn find_port() -> Result<PathBuf> {
    for entry in fs::read_dir("/sys/class/virtio-ports").context("cannot list the virtio ports")? {
        let entry = entry.context("cannot list the virtio ports")?;
        if fs::read_to_string(entry.path().join("name")).is_ok_and(|name| name.trim_end() == PORT) {
            return Ok(PathBuf::from("/dev").join(entry.file_name()));
        }
    }
    bail!("no virtio port is named {PORT}")
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
    // All processes that had the pipes open are dead, so the pumps end.
    for pump in pumps.into_iter().flatten() {
        let _ = pump.join();
    }
    outcome
}

/// Waits for the job's process. Meanwhile reaps orphans, as a first process must.
fn wait(job: Pid) -> Outcome {
    loop {
        match waitpid(None, None) {
            Ok(WaitStatus::Exited(process, code)) if process == job => return Outcome::Exited(code),
            Ok(WaitStatus::Signaled(process, signal, _)) if process == job => {
                return Outcome::Killed(signal.as_str().to_owned());
            }
            Ok(_) | Err(Errno::EINTR) => (),
            Err(error) => return Outcome::NotStarted(format!("cannot wait for the process: {error}")),
        }
    }
}

/// Kills every process but this one: kill(2) spares the first process.
fn kill_all() {
    // Fails with ESRCH if there is no other process.
    let _ = kill(Pid::from_raw(-1), Signal::SIGKILL);
}

/// Starts a thread that reports the output in a pipe line by line, until no process can write to the pipe any more.
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
    // Fails if the supervisor has ended. `serve` then fails as well, which powers off the machine.
    let _ = send(&*port, report);
}
