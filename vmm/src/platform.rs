//! The VM's fixed addresses and interrupt numbers, on which the boot code, the ACPI tables and the devices must agree.
//! All memory addresses are in the first MiB or in the 32-bit hole of [`crate::memory`].

use crate::memory::HOLE_START;

/// The boot GDT.
pub const GDT: u64 = 0x500;
/// The boot parameters ("zero page").
pub const ZERO_PAGE: u64 = 0x7000;
/// The boot page tables: six pages.
pub const PAGE_TABLES: u64 = 0x9000;
/// The kernel's command line.
pub const COMMAND_LINE: u64 = 0x2_0000;
/// The end of conventional memory.
pub const CONVENTIONAL_END: u64 = 0x9_fc00;
/// The ACPI tables, the RSDP first, in the area that the guest searches for it.
pub const ACPI_TABLES: u64 = 0xe_0000;
/// The end of the ACPI tables' area, and the start of extended memory.
pub const EXTENDED_START: u64 = 0x10_0000;

/// The first virtio-mmio device's registers; the others follow.
pub const VIRTIO_MMIO: u64 = HOLE_START + (256 << 20);
/// The space of one virtio-mmio device.
pub const VIRTIO_MMIO_SIZE: u64 = 0x1000;
/// The I/O APIC.
pub const IO_APIC: u32 = 0xfec0_0000;
/// The local APICs.
pub const LOCAL_APIC: u32 = 0xfee0_0000;
/// One page that KVM needs on Intel processors.
pub const IDENTITY_MAP: u64 = 0xfffb_c000;
/// Three pages that KVM needs on Intel processors.
pub const TASK_STATE: usize = 0xfffb_d000;

/// The serial port's first I/O port.
pub const SERIAL_PORT: u16 = 0x3f8;
/// The number of the serial port's I/O ports.
pub const SERIAL_PORTS: u8 = 8;
/// The serial port's interrupt.
pub const SERIAL_GSI: u32 = 4;
/// The first virtio-mmio device's interrupt; the others follow.
pub const VIRTIO_GSI: u32 = 5;
/// The number of the I/O APIC's interrupts.
pub const GSI_COUNT: u32 = 24;
/// The largest number of virtio-mmio devices: each has its own interrupt.
pub const MAX_VIRTIO_DEVICES: u32 = GSI_COUNT - VIRTIO_GSI;

/// The place of a virtio-mmio device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VirtioSlot {
    /// Its registers.
    pub address: u64,
    /// Its interrupt.
    pub gsi: u32,
}

/// Returns the slots of the first `count` virtio-mmio devices, at most [`MAX_VIRTIO_DEVICES`].
pub fn virtio_slots(count: usize) -> impl Iterator<Item = VirtioSlot> {
    (0..MAX_VIRTIO_DEVICES).take(count).map(|index| VirtioSlot {
        address: VIRTIO_MMIO + u64::from(index) * VIRTIO_MMIO_SIZE,
        gsi: VIRTIO_GSI + index,
    })
}
