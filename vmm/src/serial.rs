//! The guest's serial console: a 16550 whose interrupt is an irqfd.
//!
//! A vCPU thread writes the guest's output directly. The main thread enters input, as much as the device's FIFO takes.
//! When the guest has emptied the FIFO, an eventfd signals that there is room again.

use std::fmt;
use std::fs::File;
use std::io::{self, Write};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use baton_protocol::migration::state::SerialState;
use thiserror::Error;
use vm_superio::serial::SerialEvents;
use vm_superio::{Serial, Trigger, serial};
use vmm_sys_util::eventfd::EventFd;

use crate::config::SerialTarget;
use crate::event;
use crate::mmio_bus::{BusDevice, Pending};

/// Register: which interrupts the guest wants.
const INTERRUPT_ENABLE: u8 = 1;
/// Register: which interrupt is pending.
const INTERRUPT_IDENTIFICATION: u8 = 2;
/// Register: the word format, and [`DIVISOR_LATCH`].
const LINE_CONTROL: u8 = 3;
/// Register: whether there is input, and room for output.
const LINE_STATUS: u8 = 5;
/// Interrupt enable: for input. Line status: there is input.
const RECEIVED: u8 = 1;
/// Interrupt identification: none.
const NO_INTERRUPT: u8 = 1;
/// Interrupt identification: input.
const INPUT_INTERRUPT: u8 = 1 << 2;
/// Line control: the first two registers access the divisor.
const DIVISOR_LATCH: u8 = 1 << 7;

/// Why the console cannot be created or restored.
#[derive(Debug, Error)]
pub enum SerialError {
    /// The output file cannot be created.
    #[error("cannot write the serial console to {}", path.display())]
    Open {
        /// Its path.
        path: std::path::PathBuf,
        /// The I/O error.
        #[source]
        source: io::Error,
    },
    /// An eventfd cannot be created.
    #[error("cannot create the serial console's eventfds")]
    Event(#[source] io::Error),
    /// A state with more input than the device holds.
    #[error("the received state is not valid for a 16550 serial port")]
    State(#[source] serial::Error<io::Error>),
}

/// The interrupt line: one pulse per signal.
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

/// The output, which outlives a device that [`SharedConsole::restore`] replaces.
#[derive(Clone)]
struct Output(Arc<Mutex<dyn Write + Send>>);

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).flush()
    }
}

/// The device on the bus.
pub struct Console(Serial<Interrupt, RoomSignal, Output>);

impl BusDevice for Console {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        match (u8::try_from(offset), data) {
            (Ok(INTERRUPT_IDENTIFICATION), [byte]) => *byte = self.identify(),
            (Ok(register), [byte]) => *byte = self.0.read(register),
            (_, data) => data.fill(0xff),
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Option<Pending> {
        // The byte is lost if the output does not accept it (a closed pipe, a full disk), as on an unconnected line.
        if let (Ok(register), &[byte]) = (u8::try_from(offset), data)
            && let Err(error) = self.0.write(register, byte)
        {
            tracing::debug!("the serial console lost a byte: {error}");
        }
        None
    }
}

impl Console {
    /// Returns the pending interrupt. A 16550 reports the input interrupt as long as there is input. `vm_superio`
    /// reports it until the first byte is read, so a guest that reads a fixed number of bytes per interrupt would never
    /// read the rest.
    fn identify(&mut self) -> u8 {
        let identified = self.0.read(INTERRUPT_IDENTIFICATION);
        let waits = self.0.read(LINE_STATUS) & RECEIVED != 0;
        let latched = self.0.read(LINE_CONTROL) & DIVISOR_LATCH != 0;
        if identified & NO_INTERRUPT == 0 || !waits || latched {
            return identified;
        }
        let wanted = self.0.read(INTERRUPT_ENABLE) & RECEIVED != 0;
        if wanted { identified & !NO_INTERRUPT | INPUT_INTERRUPT } else { identified }
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
    output: Output,
}

impl fmt::Debug for SharedConsole {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("SharedConsole").finish_non_exhaustive()
    }
}

impl SharedConsole {
    /// Creates a console whose output goes to `target`.
    pub fn new(target: &SerialTarget) -> Result<Self, SerialError> {
        match target {
            SerialTarget::Stdio => Self::with_output(io::stdout()),
            SerialTarget::File(path) => Self::with_output(
                File::create(path).map_err(|source| SerialError::Open { path: path.clone(), source })?,
            ),
        }
        .map_err(SerialError::Event)
    }

    fn with_output(output: impl Write + Send + 'static) -> io::Result<Self> {
        let interrupt = event::new()?;
        let room = event::new()?;
        let output = Output(Arc::new(Mutex::new(output)));
        let serial = Serial::with_events(
            Interrupt(interrupt.try_clone()?),
            RoomSignal(room.try_clone()?),
            output.clone(),
        );
        Ok(Self { device: Arc::new(Mutex::new(Console(serial))), interrupt, room, output })
    }

    /// Returns the device's state. The vCPUs must be paused.
    pub fn save(&self) -> SerialState {
        let state = self.device().0.state();
        SerialState {
            divisor_low: state.baud_divisor_low,
            divisor_high: state.baud_divisor_high,
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
            input: state.in_buffer,
        }
    }

    /// Restores the device's state, and interrupts the guest again if an interrupt is pending.
    pub fn restore(&self, state: &SerialState) -> Result<(), SerialError> {
        let state = serial::SerialState {
            baud_divisor_low: state.divisor_low,
            baud_divisor_high: state.divisor_high,
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
            in_buffer: state.input.clone(),
        };
        let clone = |event: &EventFd| event.try_clone().map_err(SerialError::Event);
        let (interrupt, room) = (Interrupt(clone(&self.interrupt)?), RoomSignal(clone(&self.room)?));
        let restored = Serial::from_state(&state, interrupt, room, self.output.clone());
        self.device().0 = restored.map_err(SerialError::State)?;
        // Wakes the main thread, which then reads the new device's capacity.
        event::signal(&self.room);
        Ok(())
    }

    fn device(&self) -> MutexGuard<'_, Console> {
        self.device.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns how many bytes of input the device takes now.
    pub fn capacity(&self) -> usize {
        self.device().0.fifo_capacity()
    }

    /// Enters input of at most [`Self::capacity`] bytes.
    pub fn input(&self, bytes: &[u8]) {
        let mut device = self.device();
        if let Err(error) = device.0.enqueue_raw_bytes(bytes) {
            tracing::debug!("the serial console lost input: {error}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const INTERRUPT_ENABLE: u64 = super::INTERRUPT_ENABLE as u64;
    const SCRATCH: u64 = 7;

    #[test]
    fn input_interrupts_the_guest_and_reading_it_signals_room() {
        let console = SharedConsole::with_output(io::sink()).unwrap();
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
    fn input_interrupt_is_pending_as_long_as_there_is_input() {
        let console = SharedConsole::with_output(io::sink()).unwrap();
        let mut byte = [0];
        let mut identify = |console: &SharedConsole| {
            console.device().read(INTERRUPT_IDENTIFICATION.into(), &mut byte);
            byte[0] & 0xf
        };
        console.input(b"abc");
        assert_eq!(identify(&console), NO_INTERRUPT);
        console.device().write(INTERRUPT_ENABLE, &[RECEIVED]);
        for _ in 0..3 {
            assert_eq!(identify(&console), INPUT_INTERRUPT);
            console.device().read(0, &mut [0]);
        }
        assert_eq!(identify(&console), NO_INTERRUPT);
    }

    #[test]
    fn restored_console_continues_where_the_saved_one_stopped() {
        let console = SharedConsole::with_output(io::sink()).unwrap();
        console.device().write(INTERRUPT_ENABLE, &[RECEIVED]);
        console.device().write(SCRATCH, &[0x5a]);
        console.input(b"ab");

        let other = SharedConsole::with_output(io::sink()).unwrap();
        other.restore(&console.save()).unwrap();
        assert_eq!(other.save(), console.save());
        assert_eq!(other.interrupt.read().unwrap(), 1);
        let mut byte = [0];
        other.device().read(SCRATCH, &mut byte);
        assert_eq!(byte, [0x5a]);
        other.device().read(0, &mut byte);
        assert_eq!(&byte, b"a");
    }

    #[test]
    fn state_with_more_input_than_the_fifo_holds_is_rejected() {
        let console = SharedConsole::with_output(io::sink()).unwrap();
        let state = SerialState { input: vec![0; 65], ..console.save() };
        assert!(matches!(console.restore(&state), Err(SerialError::State(_))));
    }

    #[test]
    fn accesses_of_other_sizes_are_ignored() {
        let console = SharedConsole::with_output(io::sink()).unwrap();
        let mut device = console.device.lock().unwrap();
        device.write(0, &[1, 2, 3, 4]);
        device.write(7, &[]);
        let mut data = [0; 2];
        device.read(0, &mut data);
        assert_eq!(data, [0xff; 2]);
    }
}
