//! The guest's serial console: a 16550 whose interrupt is an irqfd.
//!
//! Output goes out on the vCPU thread that writes it. Input is put in by the main thread, as much as the
//! device's FIFO takes; when the guest has emptied the FIFO, an event says that there is room again.

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
/// Register: which one there is.
const INTERRUPT_IDENTIFICATION: u8 = 2;
/// Register: the bytes' sizes, and [`DIVISOR_LATCH`].
const LINE_CONTROL: u8 = 3;
/// Register: what there is to read, and room to write.
const LINE_STATUS: u8 = 5;
/// Interrupt enable: for input. Line status: there is input.
const RECEIVED: u8 = 1;
/// Interrupt identification: none.
const NO_INTERRUPT: u8 = 1;
/// Interrupt identification: input.
const INPUT_INTERRUPT: u8 = 1 << 2;
/// Line control: the first two registers are the divisor's.
const DIVISOR_LATCH: u8 = 1 << 7;

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
    /// A state with more input than the device holds.
    #[error("the serial port's state cannot be that of a 16550")]
    State(#[source] serial::Error<io::Error>),
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

/// Where the output goes, whichever device writes it.
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
        // An error is a byte that the output did not take (a closed pipe, a full disk): as lost as on a line that
        // nobody listens to.
        if let (Ok(register), &[byte]) = (u8::try_from(offset), data)
            && let Err(error) = self.0.write(register, byte)
        {
            tracing::debug!("the serial console lost a byte: {error}");
        }
        None
    }
}

impl Console {
    /// Which interrupt there is. A 16550 has that for input as long as there is input. The crate's device has it
    /// until the first byte is read: a guest that reads so many bytes an interrupt and no more would leave the
    /// others for ever.
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
    /// A console whose output goes to `target`.
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

    /// The device's state. The vCPUs are paused.
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

    /// Puts a state into the device, and tells the guest of what waits there.
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
        // The main thread looks at the new device's room.
        event::signal(&self.room);
        Ok(())
    }

    fn device(&self) -> MutexGuard<'_, Console> {
        self.device.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How many bytes of input the device takes now.
    pub fn capacity(&self) -> usize {
        self.device().0.fifo_capacity()
    }

    /// Puts input in; at most [`Self::capacity`] bytes.
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
    fn input_interrupts_and_room_is_signalled() {
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
    fn input_interrupts_as_long_as_there_is_some() {
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
    fn another_console_goes_on_where_this_one_stops() {
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
    fn more_input_than_the_fifo_holds_is_no_state() {
        let console = SharedConsole::with_output(io::sink()).unwrap();
        let state = SerialState { input: vec![0; 65], ..console.save() };
        assert!(matches!(console.restore(&state), Err(SerialError::State(_))));
    }

    #[test]
    fn odd_accesses_do_nothing() {
        let console = SharedConsole::with_output(io::sink()).unwrap();
        let mut device = console.device.lock().unwrap();
        device.write(0, &[1, 2, 3, 4]);
        device.write(7, &[]);
        let mut data = [0; 2];
        device.read(0, &mut data);
        assert_eq!(data, [0xff; 2]);
    }
}
