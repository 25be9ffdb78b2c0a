//! The ACPI tables: how the guest finds its processors, its interrupt controllers and its devices.
//!
//! Hardware-reduced ACPI (ACPI 6.5, section 4.1): no fixed hardware, no system control interrupt; sleep and
//! reset registers are I/O ports. Stock distribution kernels do not support the `virtio_mmio.device=` parameter, so
//! each virtio-mmio device is an `LNRO0005` in the DSDT. Its interrupt is edge-triggered: an irqfd delivers the
//! back-end's call as a pulse, and nothing would lower a level.

use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, aml};
use thiserror::Error;
use vm_memory::{Bytes, GuestAddress};

use crate::memory::GuestMemory;
use crate::platform::{
    ACPI_TABLES, EXTENDED_START, IO_APIC, LOCAL_APIC, SERIAL_GSI, SERIAL_PORT, SERIAL_PORTS,
    VIRTIO_MMIO_SIZE, VirtioSlot,
};
use crate::power::{ACPI_PORT, RESET, RESET_VALUE, SLEEP_CONTROL, SLEEP_STATUS, SLEEP_TYPE_S5};

const OEM: [u8; 6] = *b"BATON ";
const OEM_TABLE: [u8; 8] = *b"BATONVMM";
const OEM_REVISION: u32 = 1;
const DSDT_REVISION: u8 = 6;
const TABLE_HEADER: u32 = 36;
const TABLE_ALIGNMENT: u64 = 16;

/// IA-PC boot architecture flags: no VGA (bit 2), no CMOS clock (bit 5). Bit 1 is clear: no keyboard.
const BOOT_ARCHITECTURE: u16 = 1 << 2 | 1 << 5;

/// Why the tables cannot be written.
#[derive(Debug, Error)]
pub enum AcpiError {
    /// A device that 32-bit resources cannot describe.
    #[error("a virtio-mmio device lies above 4 GiB")]
    DeviceAddress(#[from] std::num::TryFromIntError),
    /// The tables are larger than their area.
    #[error("the ACPI tables need {0} bytes: too many devices")]
    TooLarge(u64),
    /// The tables' area is not in guest memory.
    #[error("cannot write the ACPI tables")]
    Memory(#[from] vm_memory::GuestMemoryError),
}

/// Writes all tables to [`ACPI_TABLES`].
pub fn write(memory: &GuestMemory, cpus: u8, devices: &[VirtioSlot]) -> Result<(), AcpiError> {
    let tables = build(ACPI_TABLES, cpus, devices)?;
    let size = tables.len() as u64;
    if size > EXTENDED_START - ACPI_TABLES {
        return Err(AcpiError::TooLarge(size));
    }
    memory.write_slice(&tables, GuestAddress(ACPI_TABLES))?;
    Ok(())
}

/// Returns all tables as laid out in memory from `base` on, the RSDP first.
fn build(base: u64, cpus: u8, devices: &[VirtioSlot]) -> Result<Vec<u8>, AcpiError> {
    let mut area = Area { base, bytes: vec![0; Rsdp::len()] };
    let dsdt = area.append(&dsdt(devices)?);
    let fadt = area.append(&fadt(dsdt));
    let madt = area.append(&madt(cpus));
    let mut xsdt = XSDT::new(OEM, OEM_TABLE, OEM_REVISION);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    let xsdt = area.append(&xsdt);
    let mut rsdp = Vec::new();
    Rsdp::new(OEM, xsdt).to_aml_bytes(&mut rsdp);
    area.bytes[..rsdp.len()].copy_from_slice(&rsdp);
    Ok(area.bytes)
}

/// A sequence of tables in guest memory.
struct Area {
    base: u64,
    bytes: Vec<u8>,
}

impl Area {
    /// Appends a table and returns its guest address.
    fn append(&mut self, table: &dyn Aml) -> u64 {
        let length = (self.bytes.len() as u64).next_multiple_of(TABLE_ALIGNMENT);
        self.bytes.resize(usize::try_from(length).unwrap_or(usize::MAX), 0);
        table.to_aml_bytes(&mut self.bytes);
        self.base + length
    }
}

fn fadt(dsdt: u64) -> impl Aml {
    let port = |offset: u16| {
        GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, u64::from(ACPI_PORT + offset))
    };
    let mut fadt = FADTBuilder::new(OEM, OEM_TABLE, OEM_REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::Wbinvd)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton);
    fadt.sleep_control_reg = port(SLEEP_CONTROL);
    fadt.sleep_status_reg = port(SLEEP_STATUS);
    fadt.reset_reg = port(RESET);
    fadt.reset_value = RESET_VALUE;
    fadt.iapc_boot_arch = BOOT_ARCHITECTURE.into();
    fadt.finalize()
}

fn madt(cpus: u8) -> impl Aml {
    let mut madt = MADT::new(OEM, OEM_TABLE, OEM_REVISION, LocalInterruptController::Address(LOCAL_APIC));
    for cpu in 0..cpus {
        madt.add_structure(ProcessorLocalApic::new(cpu, cpu, EnabledStatus::Enabled));
    }
    madt.add_structure(IoApic::new(0, IO_APIC, 0));
    madt
}

fn dsdt(devices: &[VirtioSlot]) -> Result<impl Aml, AcpiError> {
    let mut dsdt = Sdt::new(*b"DSDT", TABLE_HEADER, DSDT_REVISION, OEM, OEM_TABLE, OEM_REVISION);
    let mut append = |object: &dyn Aml| {
        let mut bytes = Vec::new();
        object.to_aml_bytes(&mut bytes);
        dsdt.append_slice(&bytes);
    };
    append(&aml::Name::new(
        "_S5_".into(),
        &aml::Package::new(vec![&SLEEP_TYPE_S5, &aml::ZERO, &aml::ZERO, &aml::ZERO]),
    ));
    append(&aml::Device::new(
        "_SB_.COM1".into(),
        vec![
            &aml::Name::new("_HID".into(), &aml::EISAName::new("PNP0501")),
            &aml::Name::new("_UID".into(), &aml::ZERO),
            &aml::Name::new(
                "_CRS".into(),
                &aml::ResourceTemplate::new(vec![
                    &aml::IO::new(SERIAL_PORT, SERIAL_PORT, 1, SERIAL_PORTS),
                    &aml::Interrupt::new(true, true, false, false, SERIAL_GSI),
                ]),
            ),
        ],
    ));
    for (uid, device) in (0u32..).zip(devices) {
        let (address, size) = (u32::try_from(device.address)?, u32::try_from(VIRTIO_MMIO_SIZE)?);
        append(&aml::Device::new(
            format!("_SB_.V{uid:03X}").as_str().into(),
            vec![
                &aml::Name::new("_HID".into(), &"LNRO0005"),
                &aml::Name::new("_UID".into(), &uid),
                &aml::Name::new("_CCA".into(), &aml::ONE),
                &aml::Name::new(
                    "_CRS".into(),
                    &aml::ResourceTemplate::new(vec![
                        &aml::Memory32Fixed::new(true, address, size),
                        &aml::Interrupt::new(true, true, false, false, device.gsi),
                    ]),
                ),
            ],
        ));
    }
    Ok(dsdt)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::platform::{MAX_VIRTIO_DEVICES, virtio_slots};

    const BASE: u64 = 0xe_0000;

    fn u32_at(bytes: &[u8], at: usize) -> u32 {
        u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
    }

    fn u64_at(bytes: &[u8], at: usize) -> u64 {
        u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
    }

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    /// Returns the table at a guest address.
    fn table(bytes: &[u8], address: u64) -> &[u8] {
        let at = usize::try_from(address - BASE).unwrap();
        let length = usize::try_from(u32_at(bytes, at + 4)).unwrap();
        &bytes[at..at + length]
    }

    fn tables(cpus: u8, devices: usize) -> Vec<u8> {
        build(BASE, cpus, &virtio_slots(devices).collect::<Vec<_>>()).unwrap()
    }

    #[test]
    fn every_table_is_reachable_and_has_a_valid_checksum() {
        let bytes = tables(16, 2);
        assert_eq!(&bytes[..8], b"RSD PTR ");
        assert_eq!(sum(&bytes[..20]), 0);
        assert_eq!(sum(&bytes[..36]), 0);
        let xsdt = table(&bytes, u64_at(&bytes, 24));
        assert_eq!((&xsdt[..4], sum(xsdt), xsdt.len()), (&b"XSDT"[..], 0, 36 + 2 * 8));
        let fadt = table(&bytes, u64_at(xsdt, 36));
        assert_eq!((&fadt[..4], sum(fadt)), (&b"FACP"[..], 0));
        let madt = table(&bytes, u64_at(xsdt, 44));
        assert_eq!((&madt[..4], sum(madt), madt.len()), (&b"APIC"[..], 0, 44 + 16 * 8 + 12));
        let dsdt = table(&bytes, u64_at(fadt, 140));
        assert_eq!((&dsdt[..4], sum(dsdt)), (&b"DSDT"[..], 0));
    }

    #[test]
    fn dsdt_describes_every_device() {
        let bytes = tables(1, 3);
        let count = |wanted: &[u8]| bytes.windows(wanted.len()).filter(|window| *window == wanted).count();
        assert_eq!(count(b"LNRO0005"), 3);
        for slot in virtio_slots(3) {
            let address = u32::try_from(slot.address).unwrap().to_le_bytes();
            assert_eq!(count(&address), 1);
            // An extended interrupt descriptor: consumer, edge, high, exclusive, one interrupt.
            let mut interrupt = vec![0x89, 6, 0, 0b0011, 1];
            interrupt.extend(slot.gsi.to_le_bytes());
            assert_eq!(count(&interrupt), 1);
        }
    }

    #[test]
    fn tables_of_the_largest_machine_fit() {
        let bytes = tables(16, usize::try_from(MAX_VIRTIO_DEVICES).unwrap());
        assert!(bytes.len() < usize::try_from(EXTENDED_START - ACPI_TABLES).unwrap());
    }
}
