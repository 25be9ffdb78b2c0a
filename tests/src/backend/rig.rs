//! A back-end with a TAP and the network's side of it, all in a namespace of their own.

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

/// A listening back-end with a TAP, and a packet socket on the network's side of the TAP, in a namespace of their own.
#[derive(Debug)]
pub struct Rig {
    /// The network's side of the TAP.
    pub network: PacketSocket,
    /// The back-end.
    pub backend: Backend,
    /// The back-end's datapath.
    pub datapath: Datapath,
    arguments: Vec<String>,
    /// The namespace, which is dropped last.
    pub netns: Netns,
}

impl Rig {
    /// Starts a back-end with this many queue pairs and these further arguments.
    ///
    /// # Errors
    /// If anything cannot be set up.
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
    /// If it has ended by itself.
    pub fn kill_backend(&mut self) -> Result<()> {
        self.backend.process.signal(Signal::SIGKILL)?;
        self.backend.process.wait()?;
        Ok(())
    }

    /// Starts a back-end in place of a killed one.
    ///
    /// # Errors
    /// If it does not start.
    pub fn restart_backend(&mut self) -> Result<()> {
        self.backend = Self::start_backend(self.datapath, &self.arguments)?;
        Ok(())
    }

    /// Connects and brings a device up.
    ///
    /// # Errors
    /// If it does not work.
    pub fn device(&mut self, options: Options) -> Result<Device> {
        self.backend.device(options)
    }

    /// Sends frames through a device's transmit ring and sees them arrive: after that, the pair's worker has looked at
    /// everything that was there before.
    ///
    /// # Errors
    /// If they do not arrive.
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
    /// If the TAP takes no more.
    pub fn inject(&self, numbers: std::ops::Range<u32>, length: usize) -> Result<()> {
        for number in numbers {
            self.network.send(&frames::numbered(number, length))?;
        }
        Ok(())
    }

    /// Sends numbered frames from the guest, without waiting for the device to take them.
    ///
    /// # Errors
    /// If it does not take as many as the ring has no room for.
    pub fn transmit(&self, device: &mut Device, numbers: std::ops::Range<u32>, length: usize) -> Result<()> {
        for number in numbers {
            device.send(0, &NetHeader::default(), &frames::numbered(number, length))?;
        }
        Ok(())
    }

    /// Checks that exactly these numbered frames are the next ones to arrive in the guest.
    ///
    /// # Errors
    /// If others arrive, or none.
    pub fn expect_in_guest(&self, device: &mut Device, numbers: std::ops::Range<u32>) -> Result<()> {
        for number in numbers {
            let (_, frame) = device.receive(0).with_context(|| format!("waiting for frame {number}"))?;
            ensure!(
                frames::number_of(&frame) == Some(number),
                "frame {number} is {:?}",
                frames::number_of(&frame)
            );
        }
        Ok(())
    }

    /// Checks that exactly these numbered frames are the next ones to arrive on the network.
    ///
    /// # Errors
    /// If others arrive, or none.
    pub fn expect_on_network(&mut self, numbers: std::ops::Range<u32>) -> Result<()> {
        for number in numbers {
            let (_, frame) = self.network.receive().with_context(|| format!("waiting for frame {number}"))?;
            ensure!(
                frames::number_of(&frame) == Some(number),
                "frame {number} is {:?}",
                frames::number_of(&frame)
            );
        }
        Ok(())
    }

    /// Waits for a frame on any queue pair; returns the pair and the frame.
    ///
    /// # Errors
    /// If none arrives.
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

    /// Sends a frame each way through a device, and checks that it arrives.
    ///
    /// # Errors
    /// If it does not.
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
