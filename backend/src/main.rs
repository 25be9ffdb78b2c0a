//! The back-end program: parses the command line, opens the TAP and the sockets, serves until told to end, cleans up.

use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use baton_backend::args::{self, Args, Command, DeviceState, Script};
use baton_backend::control::{self, Call, ControlError};
use baton_backend::device::{Device, DeviceConfig, Vhost};
use baton_backend::endpoint::Endpoint;
use baton_backend::event_channel::{EventSender, event_channel};
use baton_backend::handover::options::TargetOptions;
use baton_backend::handover::{FinalScript, Handovers};
use baton_backend::inherited::Inherited;
use baton_backend::script;
use baton_backend::server::control_socket::ControlSocket;
use baton_backend::server::{self, Server};
use baton_backend::tap::Tap;
use baton_backend::vhost_net::{VhostNet, VhostNetError};
use baton_channel::bound_socket::BindError;
use nix::sys::resource::{Resource, getrlimit, setrlimit};

/// `VHostUserBackendCapabilities` of QEMU's `docs/interop/vhost-user.json`.
const CAPABILITIES: &str = r#"{"type": "net"}"#;

pub(crate) fn main() -> ExitCode {
    let result = match args::parse(std::env::args_os()) {
        Ok(Command::Serve(args)) => serve(&args),
        Ok(Command::PrintCapabilities) => {
            writeln!(io::stdout(), "{CAPABILITIES}").context("cannot write to standard output")
        }
        Err(error) => return usage(&error),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // If standard error is closed, the error cannot be reported.
            let _ = writeln!(io::stderr(), "baton-backend: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Prints a usage error as one line and returns exit code 2. Prints help and version as clap does.
fn usage(error: &clap::Error) -> ExitCode {
    if !error.use_stderr() {
        let _ = error.print();
        return ExitCode::SUCCESS;
    }
    let text = error.to_string();
    let words: Vec<&str> =
        text.lines().take_while(|line| !line.starts_with("Usage:")).flat_map(str::split_whitespace).collect();
    let message = words.join(" ");
    let message = message.strip_prefix("error: ").unwrap_or(&message);
    let message = message.split(" For more information").next().unwrap_or(message);
    let _ = writeln!(io::stderr(), "baton-backend: {message}; see --help");
    ExitCode::from(2)
}

fn serve(args: &Args) -> Result<()> {
    // Before this process opens a file, which could get a number that the operator named by mistake.
    let inherited = Inherited::claim(args)?;
    let endpoint = inherited.socket.map(Endpoint::inherited).transpose()?;
    let vhost = vhost(args, inherited.vhost)?;
    let tap = match (&args.tap, inherited.tap) {
        (_, Some(fds)) => Some(Tap::from_fds(fds)?),
        (Some(name), None) => Some(Tap::open(name, args.queue_pairs.unwrap_or(1))?),
        // `args::parse` allows this only with --incoming-fds.
        (None, None) => None,
    };
    if let (Some(tap), Some(sndbuf)) = (&tap, args.sndbuf) {
        tap.set_sndbuf(sndbuf)?;
    }
    if let Some(tap) = &tap {
        tap.check_sndbuf()?;
    }
    log_to_stderr(&args.log_level);
    raise_descriptor_limit();
    let signals = server::signals().context("cannot set up signal handling")?;
    let (sender, calls) = event_channel().context("cannot create an event channel")?;
    let control = control_socket(args, sender)?;
    let endpoint = match (endpoint, &args.socket_path) {
        (Some(endpoint), _) => endpoint,
        (None, Some(path)) if args.client => Endpoint::client(path.clone())?,
        (None, Some(path)) => Endpoint::listen(path)?,
        // `args::parse` allows this only with --incoming-fds.
        (None, None) => Endpoint::Nowhere,
    };
    let options = TargetOptions {
        queue_pairs: args.queue_pairs.map(usize::from),
        vhost_fds: args.vhost_fds.as_ref().map(Vec::len),
        poll: args.poll_us,
        device_state: args.device_state,
        vhost_from_source: matches!(vhost, Vhost::Coming),
    };
    let handovers = Handovers::new(args.incoming_fds.as_deref(), options)?;
    if let (Some(script), Some(tap)) = (&args.script.0, &tap) {
        script::run("--script", script, &tap.name())?;
    }
    // Checked after --script, which may set the TAP's MTU.
    if let (Some(tap), Some(mtu)) = (&tap, args.mtu)
        && let Some(tap_mtu) = tap.mtu()
        && tap_mtu < i32::from(mtu)
    {
        let name = tap.name();
        tracing::warn!(
            "guest MTU {mtu} (--mtu) is larger than MTU {tap_mtu} of TAP {name}: the network may drop larger frames \
             from the guest; set both to the same value"
        );
    }
    let config = DeviceConfig {
        mac: args.mac.map(|mac| mac.0),
        mtu: args.mtu,
        sndbuf: args.sndbuf,
        downscript: absolute(&args.downscript)?,
        poll: args.poll_us.unwrap_or_default(),
    };
    let (sender, failures) = event_channel().context("cannot create an event channel")?;
    let name = tap.as_ref().map(Tap::name);
    let mut device = Device::new(tap, args.pairs(), vhost, config, args.io_uring, &sender)?;
    device.set_offers_device_state(args.device_state != Some(DeviceState::Off));
    let datapath = device.datapath();
    match name {
        Some(tap) => tracing::info!(tap, queue_pairs = device.pairs(), %datapath, "ready"),
        None => tracing::info!(%datapath, "waiting for a device"),
    }
    let server = Server::new(device, handovers, endpoint, control, calls, failures, signals)?;
    let (result, final_script) = server.run();
    let after = final_script.map_or(Ok(()), |FinalScript { script, tap }| {
        script::run("--downscript", &script, &tap).map_err(anyhow::Error::from)
    });
    result?;
    after
}

/// Serves the control socket. With --incoming-fds, another process may serve it until this one takes the device.
fn control_socket(args: &Args, calls: EventSender<Call>) -> Result<ControlSocket> {
    let Some(path) = &args.control_socket else { return Ok(ControlSocket::None) };
    if args.incoming_fds.is_none() {
        return Ok(ControlSocket::Served(control::start(path, calls)?));
    }
    match control::start_if_free(path, calls.clone()) {
        Ok(server) => Ok(ControlSocket::Served(server)),
        Err(ControlError::Bind(BindError::InUse { path })) => Ok(ControlSocket::Anothers { path, calls }),
        Err(error) => Err(error.into()),
    }
}

/// Opens the vhost-net instances, one for each queue pair, if the kernel is to move the frames and none are `inherited`.
fn vhost(args: &Args, inherited: Option<Vec<OwnedFd>>) -> Result<Vhost, VhostNetError> {
    let pairs_known = args.incoming_fds.is_none() || args.queue_pairs.is_some();
    if let Some(fds) = inherited {
        return Ok(Vhost::Given(VhostNet::from_fds(fds)?));
    }
    if !args.vhost {
        return Ok(Vhost::None);
    }
    let first = match VhostNet::open() {
        Ok(first) => first,
        Err(VhostNetError::Open { source, .. })
            if source.kind() == io::ErrorKind::PermissionDenied && args.incoming_fds.is_some() =>
        {
            return Ok(Vhost::Coming);
        }
        Err(error) => return Err(error),
    };
    if !pairs_known {
        return Ok(Vhost::Open(first));
    }
    let others = (1..args.pairs()).map(|_| VhostNet::open());
    Ok(Vhost::Given(std::iter::once(Ok(first)).chain(others).collect::<Result<_, _>>()?))
}

/// Returns the script's absolute path, which another process can resolve.
fn absolute(script: &Script) -> Result<Option<PathBuf>> {
    let path = script.0.as_deref();
    path.map(|path| std::path::absolute(path).context("--downscript: cannot make the path absolute"))
        .transpose()
}

fn log_to_stderr(level: &str) {
    tracing_subscriber::fmt()
        .with_writer(io::stderr)
        .with_ansi(false)
        .with_target(false)
        // clap has validated the level.
        .with_max_level(level.parse().unwrap_or(tracing::level_filters::LevelFilter::INFO))
        .init();
}

/// Raises the soft limit of open descriptors, which is meant for programs that use select(2), to the hard limit: every
/// vring and memory region needs descriptors.
fn raise_descriptor_limit() {
    let raised = getrlimit(Resource::RLIMIT_NOFILE)
        .and_then(|(_, hard)| setrlimit(Resource::RLIMIT_NOFILE, hard, hard));
    if let Err(error) = raised {
        tracing::warn!(%error, "cannot raise the limit of open files");
    }
}
