//! The I/O ports through which the guest powers off or resets: the sleep and reset registers of hardware-reduced ACPI,
//! and the reset line of the keyboard controller, which Linux uses with `reboot=k`.
//!
//! The first [`GuestEnd`] that is reported ends the VM.

use std::sync::{Arc, Mutex, PoisonError};

use thiserror::Error;
use vmm_sys_util::eventfd::EventFd;

use crate::event;
use crate::mmio_bus::{BusDevice, Pending};

/// The I/O port of the ACPI sleep control register; the sleep status and reset registers follow it.
pub const ACPI_PORT: u16 = 0x600;
/// The number of ACPI ports.
pub const ACPI_PORTS: u64 = 3;
/// The sleep control register's offset.
pub const SLEEP_CONTROL: u16 = 0;
/// The sleep status register's offset.
pub const SLEEP_STATUS: u16 = 1;
/// The reset register's offset.
pub const RESET: u16 = 2;
/// What the guest writes to the reset register.
pub const RESET_VALUE: u8 = 1;
/// The sleep type that `\_S5` names: soft off.
pub const SLEEP_TYPE_S5: u8 = 5;

/// The keyboard controller's ports: data at 0x60, command and status at 0x64.
pub const I8042_PORT: u16 = 0x60;
/// The number of ports in this range.
pub const I8042_PORTS: u64 = 5;
const I8042_COMMAND: u64 = 4;
const I8042_RESET_CPU: u8 = 0xfe;

const SLEEP_ENABLE: u8 = 1 << 5;
const SLEEP_TYPE_SHIFT: u8 = 2;
const SLEEP_TYPE_MASK: u8 = 0x7;

/// How the guest ended.
#[derive(Debug)]
pub enum GuestEnd {
    /// The guest powered off.
    PowerOff,
    /// The guest requested a reset.
    Reset,
    /// The guest cannot go on.
    Crash(Crash),
}

/// Why a guest cannot go on.
#[derive(Debug, Error)]
pub enum Crash {
    /// A triple fault.
    #[error("the guest crashed with a triple fault on vCPU {vcpu}; look at the end of its console")]
    TripleFault {
        /// The vCPU.
        vcpu: u8,
    },
    /// KVM could not run the guest.
    #[error("KVM cannot run vCPU {vcpu}: {reason}")]
    Kvm {
        /// The vCPU.
        vcpu: u8,
        /// KVM's exit reason or error.
        reason: String,
    },
}

/// Records the first end that is reported, and wakes the main thread.
#[derive(Clone, Debug)]
pub struct EndSignal {
    end: Arc<Mutex<Option<GuestEnd>>>,
    event: Arc<EventFd>,
}

impl EndSignal {
    /// Creates a signal without an end.
    pub fn new() -> std::io::Result<Self> {
        Ok(Self { end: Arc::default(), event: Arc::new(event::new()?) })
    }

    /// Reports an end; only the first counts.
    pub fn report(&self, end: GuestEnd) {
        self.end.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(end);
        event::signal(&self.event);
    }

    /// Takes the reported end.
    pub fn take(&self) -> Option<GuestEnd> {
        self.end.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// Returns an eventfd that is readable once an end is reported.
    pub fn event(&self) -> &EventFd {
        &self.event
    }
}

/// The ACPI sleep control, sleep status and reset registers.
#[derive(Debug)]
pub struct AcpiRegisters(pub EndSignal);

impl BusDevice for AcpiRegisters {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Option<Pending> {
        let &[value] = data else { return None };
        if offset == u64::from(SLEEP_CONTROL) {
            let sleep_type = (value >> SLEEP_TYPE_SHIFT) & SLEEP_TYPE_MASK;
            if value & SLEEP_ENABLE != 0 && sleep_type == SLEEP_TYPE_S5 {
                self.0.report(GuestEnd::PowerOff);
            }
        } else if offset == u64::from(RESET) && value == RESET_VALUE {
            self.0.report(GuestEnd::Reset);
        }
        None
    }
}

/// A keyboard controller without a keyboard: only its reset line works.
#[derive(Debug)]
pub struct I8042(pub EndSignal);

impl BusDevice for I8042 {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        // Status 0: both buffers are empty, so the guest does not wait before it sends the reset command.
        data.fill(0);
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Option<Pending> {
        if offset == I8042_COMMAND && data == [I8042_RESET_CPU] {
            self.0.report(GuestEnd::Reset);
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn soft_off_is_sleep_type_5_with_sleep_enable() {
        let signal = EndSignal::new().unwrap();
        let mut registers = AcpiRegisters(signal.clone());
        registers.write(0, &[5 << 2]);
        registers.write(0, &[1 << 5 | 3 << 2]);
        registers.write(1, &[1 << 5 | 5 << 2]);
        registers.write(0, &[1 << 5 | 5 << 2, 0]);
        assert!(signal.take().is_none());
        registers.write(0, &[1 << 5 | 5 << 2]);
        assert!(matches!(signal.take(), Some(GuestEnd::PowerOff)));
    }

    #[test]
    fn acpi_and_keyboard_controller_reset_the_guest() {
        let signal = EndSignal::new().unwrap();
        AcpiRegisters(signal.clone()).write(2, &[RESET_VALUE]);
        assert!(matches!(signal.take(), Some(GuestEnd::Reset)));
        let mut keyboard = I8042(signal.clone());
        keyboard.write(0, &[0xfe]);
        keyboard.write(4, &[0xd1]);
        assert!(signal.take().is_none());
        keyboard.write(4, &[0xfe]);
        assert!(matches!(signal.take(), Some(GuestEnd::Reset)));
        assert_eq!(signal.event().read().unwrap(), 2);
    }

    #[test]
    fn only_the_first_end_counts() {
        let signal = EndSignal::new().unwrap();
        signal.report(GuestEnd::PowerOff);
        signal.report(GuestEnd::Reset);
        assert!(matches!(signal.take(), Some(GuestEnd::PowerOff)));
    }
}
