//! A VM's state as it travels: everything but guest memory, which moves as file descriptors.
//!
//! Plain data, which nobody has checked. What the processor and the interrupt controllers hold travels in the kernel's
//! own structures, which are ABI ([`Opaque`]): whoever gives them to KVM checks their sizes first.

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
        // As many as there are, not as many as are said to be.
        let mut bytes = Vec::new();
        while let Some(byte) = sequence.next_element()? {
            bytes.push(byte);
        }
        Ok(Opaque(bytes))
    }
}

/// A whole VM that stands still.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmState {
    /// The vCPUs, in the order of their ids.
    pub vcpus: Vec<VcpuState>,
    /// What the VM has besides: interrupt controllers, timer, clock.
    pub platform: PlatformState,
    /// The serial port.
    pub serial: SerialState,
    /// The network devices, in the order of the command line.
    pub net: Vec<NetState>,
}

/// One vCPU.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VcpuState {
    /// What its CPUID says: each a `kvm_cpuid_entry2`.
    pub cpuid: Vec<Opaque>,
    /// Whether it runs, halts or waits for another (`kvm_mp_state`).
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
    /// All that KVM names, but for the time stamp counter.
    pub msrs: Vec<Msr>,
    /// How fast its time stamp counter runs.
    pub tsc_khz: u32,
    /// What its time stamp counter is ahead of the host's, modulo 2⁶⁴: both VMMs are on one host.
    pub tsc_offset: u64,
}

/// A model-specific register.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Msr {
    /// Its number.
    pub index: u32,
    /// What it holds.
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

/// When it was how late in the guest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Clock {
    /// The guest's kvmclock, in nanoseconds.
    pub guest: u64,
    /// The host's `CLOCK_BOOTTIME` at that time, in nanoseconds.
    pub host: u64,
}

/// A 16550.
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
    /// What the guest has not read yet.
    pub input: Vec<u8>,
}

/// One network device.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetState {
    /// What its guest was offered.
    pub identity: NetIdentity,
    /// Its virtio-mmio registers.
    pub transport: TransportState,
    /// Whether its driver is asked to announce its addresses.
    pub announce: bool,
    /// What its driver has started, if it has.
    pub driver: Option<DriverState>,
}

/// What a guest is offered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetIdentity {
    /// The virtio features.
    pub features: u64,
    /// The MAC address.
    pub mac: [u8; 6],
    /// The MTU, or 0.
    pub mtu: u16,
    /// How many queue pairs the device has.
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
    /// A change of the configuration that the driver has not acknowledged.
    pub config_pending: bool,
    /// How often the configuration has changed.
    pub config_generation: u32,
    /// The device waits for its reset.
    pub needs_reset: bool,
}

/// What a driver has told about a virtqueue.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueState {
    /// How many descriptors it has.
    pub size: u16,
    /// Whether the driver uses it.
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
    /// How many queue pairs it uses.
    pub active_queue_pairs: u16,
    /// For each data virtqueue that is ready, in their order: the next available index.
    pub bases: Vec<RingBase>,
    /// How far the control virtqueue is, if it is served.
    pub control: Option<ControlState>,
}

/// What a network driver has started, as far as it stays the same while the driver runs. A driver that resets the
/// device may change all of it at any time.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Outline {
    /// The features that the driver has acknowledged.
    pub features: u64,
    /// How many queue pairs it uses.
    pub active_queue_pairs: u16,
    /// The data virtqueues.
    pub queues: Vec<QueueState>,
}

/// How far a data virtqueue is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RingBase {
    /// The virtqueue.
    pub index: u16,
    /// The next available index to be processed.
    pub base: u16,
}

/// How far the control virtqueue is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ControlState {
    /// The next available index to be processed.
    pub next_available: u16,
    /// The next used index to be written.
    pub next_used: u16,
}
