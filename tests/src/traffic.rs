//! Network traffic whose every byte, number and size is checked at the other end: what the program `traffic` does.
//!
//! One side runs [`serve`], the other one of the checks, which opens a TCP connection, sends a request as a line of
//! JSON, and does its part: [`bulk`] TCP, numbered datagrams in [`flows`], datagrams of many [`sizes`]. Both ends are
//! the same code, so one connection checks either direction. Every wait is bounded. What is [`endless`] goes on until
//! it is told to end.

pub mod bulk;
pub mod endless;
pub mod flows;
pub mod sizes;

use std::io::{self, BufRead, BufReader, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsFd;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::ValueEnum;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// How long a silence must be to be the end: far longer than the slowest machine's, an emulated one within another.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// Who sends: the one that asks, or the server.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Direction {
    /// To the server.
    Up,
    /// From the server.
    Down,
}

/// What a check asks the server to take part in.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Request {
    Bulk {
        direction: Direction,
        bytes: u64,
        seed: u64,
    },
    /// `port` is the asking side's, where numbered datagrams are to go.
    Flows {
        direction: Direction,
        plan: flows::Plan,
        port: u16,
    },
    /// Datagrams are sent back until the connection ends.
    Echo,
}

/// Said to a server that sends endlessly.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
struct Stop;

/// A connection on which lines of JSON and raw bytes take turns.
struct Connection {
    stream: BufReader<TcpStream>,
}

impl Connection {
    fn new(stream: TcpStream) -> Result<Self> {
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        stream.set_nodelay(true)?;
        Ok(Self { stream: BufReader::with_capacity(1 << 17, stream) })
    }

    fn open(server: SocketAddr, request: &Request) -> Result<Self> {
        let stream = TcpStream::connect_timeout(&server, PATIENCE);
        let mut connection = Self::new(stream.with_context(|| format!("cannot connect to {server}"))?)?;
        connection.say(request)?;
        Ok(connection)
    }

    /// Waits that much longer for the other end.
    fn be_patient(&self, more: Duration) -> io::Result<()> {
        self.stream.get_ref().set_read_timeout(Some(PATIENCE + more))
    }

    fn say(&mut self, message: &impl Serialize) -> Result<()> {
        let mut line = serde_json::to_vec(message)?;
        line.push(b'\n');
        self.stream.get_mut().write_all(&line).context("cannot speak to the other end")
    }

    fn hear<T: DeserializeOwned>(&mut self) -> Result<T> {
        let mut line = String::new();
        if self.stream.read_line(&mut line).context("cannot hear the other end")? == 0 {
            bail!("the other end has gone");
        }
        serde_json::from_str(&line).with_context(|| format!("cannot understand {line:?}"))
    }

    /// What the other end has said, if it has said anything yet.
    fn hear_if_said<T: DeserializeOwned>(&mut self) -> Result<Option<T>> {
        if self.stream.buffer().is_empty() {
            let mut fds = [PollFd::new(self.stream.get_ref().as_fd(), PollFlags::POLLIN)];
            if poll(&mut fds, PollTimeout::ZERO)? == 0 {
                return Ok(None);
            }
        }
        self.hear().map(Some)
    }

    fn peer(&self) -> io::Result<SocketAddr> {
        self.stream.get_ref().peer_addr()
    }

    /// A datagram socket at our end of the connection's addresses.
    fn datagram_socket(&self) -> Result<UdpSocket> {
        let here: IpAddr = self.stream.get_ref().local_addr()?.ip();
        let socket = UdpSocket::bind((here, 0)).context("cannot bind a datagram socket")?;
        // Room for all that may arrive while this process does not run. Only root may have that much.
        let _ = nix::sys::socket::setsockopt(&socket, nix::sys::socket::sockopt::RcvBufForce, &(64 << 20));
        Ok(socket)
    }
}

/// Serves everyone who connects, for as long as the process runs.
pub fn serve(listener: &TcpListener) -> Result<()> {
    loop {
        let (stream, peer) = listener.accept().context("cannot accept a connection")?;
        thread::spawn(move || {
            if let Err(error) = serve_one(stream) {
                eprintln!("traffic: {peer}: {error:#}");
            }
        });
    }
}

fn serve_one(stream: TcpStream) -> Result<()> {
    let mut connection = Connection::new(stream)?;
    match connection.hear()? {
        Request::Bulk { direction: Direction::Up, .. } => bulk::serve_receive(&mut connection),
        Request::Bulk { direction: Direction::Down, bytes, seed } => {
            bulk::serve_send(&mut connection, bytes, seed)
        }
        Request::Flows { direction: Direction::Up, plan, .. } => flows::serve_receive(&mut connection, &plan),
        Request::Flows { direction: Direction::Down, plan, port } => {
            let to = SocketAddr::new(connection.peer()?.ip(), port);
            flows::serve_send(&mut connection, &plan, to)
        }
        Request::Echo => sizes::serve(&mut connection),
    }
}
