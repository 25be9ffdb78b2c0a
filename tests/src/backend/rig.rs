//! A back-end, its TAP and a socket on the network side of the TAP, in a private network namespace.

use std::os::fd::AsFd;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::Signal;

use super::Backend;
use crate::datapath::Datapath;
use crate::fake_frontend::{Device, NetHeader, Options};
use crate::frames;
use crate::netns::Netns;
use crate::packet_socket::PacketSocket;
use crate::process::PATIENCE;

/// The TAP of a [`Rig`].
pub const TAP: &str = "tap0";

/// A listening back-end with a TAP, and a packet socket on the network side of the TAP, in a private network namespace.
#[derive(Debug)]
pub struct Rig {
    /// The network side of the TAP.
    pub network: PacketSocket,
    /// The back-end.
    pub backend: Backend,
    /// The back-end's datapath.
    pub datapath: Datapath,
    arguments: Vec<String>,
    /// The namespace. Declared last because it must be dropped last.
    pub netns: Netns,
}

impl Rig {
    /// Starts a back-end with this many queue pairs and these further arguments.
    ///
    /// # Errors
    /// Returns an error if the namespace, the TAP or the back-end cannot be set up.
    pub fn new(datapath: Datapath, queue_pairs: u16, arguments: &[&str]) -> Result<Self> {
        let netns = Netns::enter()?;
        netns.create_persistent_tap(TAP, queue_pairs > 1)?;
        let network = PacketSocket::open(TAP)?;
        let mut all = vec![format!("--tap={TAP}"), format!("--queue-pairs={queue_pairs}")];
        all.extend(arguments.iter().map(|&argument| argument.into()));
        let backend = Self::start_backend(datapath, &all)?;
        Ok(Self { network, backend, datapath, arguments: all, netns })
    }

    fn start_backend(datapath: Datapath, arguments: &[String]) -> Result<Backend> {
        let arguments: Vec<_> = arguments.iter().map(String::as_str).collect();
        let mut backend = Backend::listening(datapath, &arguments, &[])?;
        // The control socket answers once the back-end is set up.
        backend.status()?;
        Ok(backend)
    }

    /// Kills the back-end.
    ///
    /// # Errors
    /// Returns an error if the back-end has already ended.
    pub fn kill_backend(&mut self) -> Result<()> {
        self.backend.process.signal(Signal::SIGKILL)?;
        self.backend.process.wait()?;
        Ok(())
    }

    /// Starts a back-end in place of a killed one.
    ///
    /// # Errors
    /// Returns an error if the back-end does not start.
    pub fn restart_backend(&mut self) -> Result<()> {
        self.backend = Self::start_backend(self.datapath, &self.arguments)?;
        Ok(())
    }

    /// Connects as a front-end and brings a device up.
    ///
    /// # Errors
    /// Returns the errors of [`Backend::device`].
    pub fn device(&mut self, options: Options) -> Result<Device> {
        self.backend.device(options)
    }

    /// Sends frames through a device's transmit ring and waits for them. When they have arrived, the pair's worker has
    /// handled everything that was pending before.
    ///
    /// # Errors
    /// Returns an error if a frame does not arrive.
    pub fn worker_rounds(&mut self, device: &mut Device, pair: usize) -> Result<()> {
        for round in 0..10 {
            let frame = frames::numbered(round, 60);
            device.send(pair, &NetHeader::default(), &frame)?;
            let (_, received) = self.network.receive()?;
            ensure!(received == frame, "the network received something else");
        }
        Ok(())
    }

    /// Sends numbered frames from the network.
    ///
    /// # Errors
    /// Returns an error if the TAP accepts no more frames.
    pub fn inject(&self, numbers: std::ops::Range<u32>, length: usize) -> Result<()> {
        for number in numbers {
            self.network.send(&frames::numbered(number, length))?;
        }
        Ok(())
    }

    /// Sends numbered frames from the guest. Waits for the device only while the ring is full.
    ///
    /// # Errors
    /// Returns an error if the ring stays full.
    pub fn transmit(&self, device: &mut Device, numbers: std::ops::Range<u32>, length: usize) -> Result<()> {
        for number in numbers {
            device.send(0, &NetHeader::default(), &frames::numbered(number, length))?;
        }
        Ok(())
    }

    /// Checks that exactly these numbered frames arrive next in the guest.
    ///
    /// # Errors
    /// Returns an error if a different frame arrives, or none.
    pub fn expect_in_guest(&self, device: &mut Device, numbers: std::ops::Range<u32>) -> Result<()> {
        for number in numbers {
            let (_, frame) = device.receive(0).with_context(|| format!("waiting for frame {number}"))?;
            ensure!(
                frames::number_of(&frame) == Some(number),
                "received frame {:?} instead of {number}",
                frames::number_of(&frame)
            );
        }
        Ok(())
    }

    /// Checks that exactly these numbered frames arrive next on the network.
    ///
    /// # Errors
    /// Returns an error if a different frame arrives, or none.
    pub fn expect_on_network(&mut self, numbers: std::ops::Range<u32>) -> Result<()> {
        for number in numbers {
            let (_, frame) = self.network.receive().with_context(|| format!("waiting for frame {number}"))?;
            ensure!(
                frames::number_of(&frame) == Some(number),
                "received frame {:?} instead of {number}",
                frames::number_of(&frame)
            );
        }
        Ok(())
    }

    /// Waits for a frame on any queue pair. Returns the pair and the frame.
    ///
    /// # Errors
    /// Returns an error if no frame arrives.
    pub fn receive_on_any(&self, device: &mut Device) -> Result<(usize, Vec<u8>)> {
        let deadline = Instant::now() + PATIENCE;
        let mut frame = Vec::new();
        loop {
            for pair in 0..device.pairs.len() {
                if device.try_receive(pair, &mut frame)?.is_some() {
                    return Ok((pair, frame));
                }
            }
            let calls = device.pairs.iter_mut().map(|pair| pair.receive.queue.enable_calls());
            if calls.fold(true, |idle, none| idle & none) {
                let left = deadline.saturating_duration_since(Instant::now());
                let fds = device.pairs.iter().map(|pair| pair.receive.call.as_fd());
                let mut fds: Vec<_> = fds.map(|fd| PollFd::new(fd, PollFlags::POLLIN)).collect();
                poll(&mut fds, PollTimeout::try_from(left)?)?;
                for pair in &device.pairs {
                    pair.receive.take_calls()?;
                }
                ensure!(Instant::now() < deadline, "no frame arrived in the guest");
            }
        }
    }

    /// Sends a frame from every queue pair of a device and one from the network, and checks that each arrives.
    ///
    /// # Errors
    /// Returns an error if a frame does not arrive unchanged.
    pub fn check_traffic(&mut self, device: &mut Device) -> Result<()> {
        for pair in 0..device.pairs.len() {
            let frame = frames::numbered(u32::try_from(pair)?, 100 + pair);
            device.send(pair, &NetHeader::default(), &frame)?;
            let (_, received) = self.network.receive()?;
            ensure!(received == frame, "the network received something else");
        }
        let frame = frames::numbered(77, 177);
        self.network.send(&frame)?;
        let (_, received) = self.receive_on_any(device)?;
        ensure!(received == frame, "the guest received something else");
        Ok(())
    }
}
