//! The wire state of a VM: everything but guest memory, which moves as file descriptors.
//!
//! Plain, untrusted data. The state of the processors and the interrupt controllers is sent in the kernel's structures,
//! which are ABI ([`Opaque`]). The target must check their sizes before it passes them to KVM.

use std::fmt;

use serde::de::{SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A structure of the kernel's ABI, byte for byte.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Opaque(pub Vec<u8>);

impl fmt::Debug for Opaque {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "Opaque({} bytes)", self.0.len())
    }
}

impl Serialize for Opaque {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_bytes(&self.0)
    }
}

impl<'de> Deserialize<'de> for Opaque {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_byte_buf(OpaqueVisitor)
    }
}

struct OpaqueVisitor;

impl<'de> Visitor<'de> for OpaqueVisitor {
    type Value = Opaque;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("bytes")
    }

    fn visit_bytes<E>(self, bytes: &[u8]) -> Result<Opaque, E> {
        Ok(Opaque(bytes.to_vec()))
    }

    fn visit_byte_buf<E>(self, bytes: Vec<u8>) -> Result<Opaque, E> {
        Ok(Opaque(bytes))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut sequence: A) -> Result<Opaque, A::Error> {
        // Grows with the elements present; the announced length is untrusted.
        let mut bytes = Vec::new();
        while let Some(byte) = sequence.next_element()? {
            bytes.push(byte);
        }
        Ok(Opaque(bytes))
    }
}

/// A stopped VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmState {
    /// The vCPUs, in the order of their ids.
    pub vcpus: Vec<VcpuState>,
    /// The interrupt controllers, the timer and the clock.
    pub platform: PlatformState,
    /// The serial port.
    pub serial: SerialState,
    /// The network devices, in the order of the command line.
    pub net: Vec<NetState>,
}

/// One vCPU.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VcpuState {
    /// The CPUID entries, each a `kvm_cpuid_entry2`.
    pub cpuid: Vec<Opaque>,
    /// Whether the vCPU is running, halted or waiting for a start-up IPI (`kvm_mp_state`).
    pub run_state: Opaque,
    /// `kvm_regs`.
    pub registers: Opaque,
    /// `kvm_sregs`.
    pub special_registers: Opaque,
    /// `kvm_xsave`.
    pub extended_state: Opaque,
    /// `kvm_xcrs`.
    pub extended_controls: Opaque,
    /// `kvm_debugregs`.
    pub debug_registers: Opaque,
    /// `kvm_lapic_state`.
    pub local_apic: Opaque,
    /// `kvm_vcpu_events`.
    pub events: Opaque,
    /// All MSRs that KVM lists, except the time stamp counter.
    pub msrs: Vec<Msr>,
    /// The frequency of the time stamp counter, in kHz.
    pub tsc_khz: u32,
    /// The offset of the time stamp counter from the host's, modulo 2⁶⁴. Valid at the target because both VMMs run on
    /// one host.
    pub tsc_offset: u64,
}

/// A model-specific register.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Msr {
    /// The register's number.
    pub index: u32,
    /// The register's value.
    pub value: u64,
}

/// The VM without its vCPUs and devices.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlatformState {
    /// The first 8259 (`kvm_irqchip`).
    pub pic_primary: Opaque,
    /// The second 8259 (`kvm_irqchip`).
    pub pic_secondary: Opaque,
    /// The I/O APIC (`kvm_irqchip`).
    pub io_apic: Opaque,
    /// The 8254 (`kvm_pit_state2`).
    pub timer: Opaque,
    /// The guest's clock.
    pub clock: Clock,
}

/// The guest's clock and the host time at which it was read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Clock {
    /// The guest's kvmclock, in nanoseconds.
    pub guest: u64,
    /// The host's `CLOCK_BOOTTIME`, in nanoseconds.
    pub host: u64,
}

/// A 16550 UART.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SerialState {
    /// Divisor latch, low byte.
    pub divisor_low: u8,
    /// Divisor latch, high byte.
    pub divisor_high: u8,
    /// Interrupt enable register.
    pub interrupt_enable: u8,
    /// Interrupt identification register.
    pub interrupt_identification: u8,
    /// Line control register.
    pub line_control: u8,
    /// Line status register.
    pub line_status: u8,
    /// Modem control register.
    pub modem_control: u8,
    /// Modem status register.
    pub modem_status: u8,
    /// Scratch register.
    pub scratch: u8,
    /// Input that the guest has not read yet.
    pub input: Vec<u8>,
}

/// One network device.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetState {
    /// What the device offers to the guest.
    pub identity: NetIdentity,
    /// The virtio-mmio registers.
    pub transport: TransportState,
    /// Whether the driver is asked to announce its addresses.
    pub announce: bool,
    /// What the driver has started, if anything.
    pub driver: Option<DriverState>,
}

/// What a network device offers to the guest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetIdentity {
    /// The virtio features.
    pub features: u64,
    /// The MAC address.
    pub mac: [u8; 6],
    /// The MTU, or 0.
    pub mtu: u16,
    /// The number of queue pairs.
    pub queue_pairs: u16,
}

/// The registers of a virtio-mmio device.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TransportState {
    /// Device status.
    pub status: u32,
    /// Which half of the device's features can be read.
    pub device_features_select: u32,
    /// Which half of the driver's features can be written.
    pub driver_features_select: u32,
    /// The features that the driver has acknowledged.
    pub driver_features: u64,
    /// The virtqueue whose registers can be accessed.
    pub queue_select: u32,
    /// Every virtqueue.
    pub queues: Vec<QueueState>,
    /// The driver has not acknowledged a configuration change yet.
    pub config_pending: bool,
    /// The number of configuration changes.
    pub config_generation: u32,
    /// The device needs a reset by the driver.
    pub needs_reset: bool,
}

/// A virtqueue as the driver set it up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueState {
    /// The number of descriptors.
    pub size: u16,
    /// Whether the driver has made the virtqueue ready (`QueueReady`).
    pub ready: bool,
    /// The descriptor table's guest address.
    pub descriptor_table: u64,
    /// The available ring's guest address.
    pub available_ring: u64,
    /// The used ring's guest address.
    pub used_ring: u64,
}

/// What a network driver has started.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DriverState {
    /// The number of queue pairs that the driver uses.
    pub active_queue_pairs: u16,
    /// The base of each ready data virtqueue, in order.
    pub bases: Vec<RingBase>,
    /// The position in the control virtqueue, if it is served.
    pub control: Option<ControlState>,
}

/// The part of a network driver's set-up that stays the same while the driver runs. A driver that resets the device may
/// change all of it at any time.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Outline {
    /// The features that the driver has acknowledged.
    pub features: u64,
    /// The number of queue pairs that the driver uses.
    pub active_queue_pairs: u16,
    /// The data virtqueues.
    pub queues: Vec<QueueState>,
}

/// The position in a data virtqueue.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RingBase {
    /// The virtqueue's index.
    pub index: u16,
    /// The next available index to be processed.
    pub base: u16,
}

/// The position in the control virtqueue.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ControlState {
    /// The next available index to be processed.
    pub next_available: u16,
    /// The next used index to be written.
    pub next_used: u16,
}
