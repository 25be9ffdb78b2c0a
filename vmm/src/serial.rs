//! The guest's serial console: a 16550 whose interrupt is an irqfd.
//!
//! Output goes out on the vCPU thread that writes it. Input is put in by the main thread, as much as the
//! device's FIFO takes; when the guest has emptied the FIFO, an event says that there is room again.

use std::fs::File;
use std::io::{self, Write};
use std::sync::{Arc, Mutex, PoisonError};

use thiserror::Error;
use vm_superio::serial::SerialEvents;
use vm_superio::{Serial, Trigger};
use vmm_sys_util::eventfd::EventFd;

use crate::config::SerialTarget;
use crate::event;
use crate::mmio_bus::BusDevice;

/// Why there is no console.
#[derive(Debug, Error)]
pub enum SerialError {
    /// The file for the output.
    #[error("cannot write the serial console to {}", path.display())]
    Open {
        /// Its path.
        path: std::path::PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// An event.
    #[error("cannot make the serial console's events")]
    Event(#[source] io::Error),
}

/// The interrupt line: one pulse an event.
#[derive(Debug)]
struct Interrupt(EventFd);

impl Trigger for Interrupt {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

/// Tells the main thread that the FIFO has room.
#[derive(Debug)]
struct RoomSignal(EventFd);

impl SerialEvents for RoomSignal {
    fn buffer_read(&self) {}
    fn out_byte(&self) {}
    fn tx_lost_byte(&self) {}
    fn in_buffer_empty(&self) {
        event::signal(&self.0);
    }
}

/// The device on the bus.
pub struct Console(Serial<Interrupt, RoomSignal, Box<dyn Write + Send>>);

impl BusDevice for Console {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        match (u8::try_from(offset), data) {
            (Ok(register), [byte]) => *byte = self.0.read(register),
            (_, data) => data.fill(0xff),
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        // An error is a byte that the output did not take (a closed pipe, a full disk): as lost as on a line that
        // nobody listens to.
        if let (Ok(register), &[byte]) = (u8::try_from(offset), data)
            && let Err(error) = self.0.write(register, byte)
        {
            tracing::debug!("the serial console lost a byte: {error}");
        }
    }
}

/// The console, shared between the bus and the main thread.
pub struct SharedConsole {
    /// The device.
    pub device: Arc<Mutex<Console>>,
    /// The interrupt, to be registered as an irqfd.
    pub interrupt: EventFd,
    /// Readable when the guest has read all input.
    pub room: EventFd,
}

impl SharedConsole {
    /// A console whose output goes to `target`.
    pub fn new(target: &SerialTarget) -> Result<Self, SerialError> {
        let output: Box<dyn Write + Send> = match target {
            SerialTarget::Stdio => Box::new(io::stdout()),
            SerialTarget::File(path) => Box::new(
                File::create(path).map_err(|source| SerialError::Open { path: path.clone(), source })?,
            ),
        };
        Self::with_output(output).map_err(SerialError::Event)
    }

    fn with_output(output: Box<dyn Write + Send>) -> io::Result<Self> {
        let interrupt = event::new()?;
        let room = event::new()?;
        let serial =
            Serial::with_events(Interrupt(interrupt.try_clone()?), RoomSignal(room.try_clone()?), output);
        Ok(Self { device: Arc::new(Mutex::new(Console(serial))), interrupt, room })
    }

    /// How many bytes of input the device takes now.
    pub fn capacity(&self) -> usize {
        self.device.lock().unwrap_or_else(PoisonError::into_inner).0.fifo_capacity()
    }

    /// Puts input in; at most [`Self::capacity`] bytes.
    pub fn input(&self, bytes: &[u8]) {
        let mut device = self.device.lock().unwrap_or_else(PoisonError::into_inner);
        if let Err(error) = device.0.enqueue_raw_bytes(bytes) {
            tracing::debug!("the serial console lost input: {error}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const INTERRUPT_ENABLE: u64 = 1;
    const RECEIVED: u8 = 1;

    #[test]
    fn input_interrupts_and_room_is_signalled() {
        let console = SharedConsole::with_output(Box::new(io::sink())).unwrap();
        console.device.lock().unwrap().write(INTERRUPT_ENABLE, &[RECEIVED]);
        let full = console.capacity();

        console.input(b"ab");
        assert_eq!(console.capacity(), full - 2);
        assert_eq!(console.interrupt.read().unwrap(), 1);
        console.room.read().unwrap_err();

        let mut byte = [0];
        console.device.lock().unwrap().read(0, &mut byte);
        assert_eq!(&byte, b"a");
        console.device.lock().unwrap().read(0, &mut byte);
        assert_eq!(&byte, b"b");
        console.room.read().unwrap();
    }

    #[test]
    fn odd_accesses_do_nothing() {
        let console = SharedConsole::with_output(Box::new(io::sink())).unwrap();
        let mut device = console.device.lock().unwrap();
        device.write(0, &[1, 2, 3, 4]);
        device.write(7, &[]);
        let mut data = [0; 2];
        device.read(0, &mut data);
        assert_eq!(data, [0xff; 2]);
    }
}
