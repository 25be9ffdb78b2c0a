//! Network traffic that is checked completely at the other end: the implementation of the program `traffic`.
//!
//! One end runs [`serve`]. The other end runs a check, which opens a TCP connection, sends a request as a line of JSON,
//! and then sends or receives: [`bulk`] data over TCP, numbered datagrams in [`flows`], or datagrams of many [`sizes`].
//! Either end can send. Every wait has a timeout. [`endless`] traffic continues until it is stopped.

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

/// The timeout of all waits. Far longer than any delay on the slowest machine, a guest in an emulated machine.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// The direction of the traffic.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Direction {
    /// From the client to the server.
    Up,
    /// From the server to the client.
    Down,
}

/// The check that a client requests from the server.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Request {
    Bulk {
        direction: Direction,
        bytes: u64,
        seed: u64,
    },
    /// `port` is the client's UDP port, which receives the datagrams from the server.
    Flows {
        direction: Direction,
        plan: flows::Plan,
        port: u16,
    },
    /// The server echoes datagrams until the connection ends.
    Echo,
}

/// Tells a server that sends endlessly to stop.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
struct Stop;

/// A connection that carries lines of JSON, and raw data between them.
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

    /// Extends the read timeout by `more`.
    fn be_patient(&self, more: Duration) -> io::Result<()> {
        self.stream.get_ref().set_read_timeout(Some(PATIENCE + more))
    }

    fn say(&mut self, message: &impl Serialize) -> Result<()> {
        let mut line = serde_json::to_vec(message)?;
        line.push(b'\n');
        self.stream.get_mut().write_all(&line).context("cannot write to the other end")
    }

    fn hear<T: DeserializeOwned>(&mut self) -> Result<T> {
        let mut line = String::new();
        if self.stream.read_line(&mut line).context("cannot read from the other end")? == 0 {
            bail!("the other end closed the connection");
        }
        serde_json::from_str(&line).with_context(|| format!("invalid message from the other end: {line:?}"))
    }

    /// Receives a message from the other end, or returns `None` if none has arrived.
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

    /// Creates a datagram socket with the local address of the connection.
    fn datagram_socket(&self) -> Result<UdpSocket> {
        let here: IpAddr = self.stream.get_ref().local_addr()?.ip();
        let socket = UdpSocket::bind((here, 0)).context("cannot bind a datagram socket")?;
        // Holds everything that may arrive while this process does not run. Only root may set such a size.
        let _ = nix::sys::socket::setsockopt(&socket, nix::sys::socket::sockopt::RcvBufForce, &(64 << 20));
        Ok(socket)
    }
}

/// Serves all clients, for as long as the process runs.
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
