//! Sets the registers and the CPUID of a vCPU before its first instruction.
//!
//! The boot CPU starts in long mode with the first 4 GiB identity-mapped, as the 64-bit Linux boot protocol requires.
//! The other CPUs wait for the start-up interrupt, which KVM's local APICs deliver. CPUID is what KVM supports, except
//! for the leaves that identify each processor.

use kvm_bindings::{
    CpuId, KVM_MAX_CPUID_ENTRIES, Msrs, kvm_cpuid_entry2, kvm_msr_entry, kvm_regs, kvm_segment,
};
use kvm_ioctls::{Cap, Kvm, VcpuFd};
use thiserror::Error;
use vm_memory::{Bytes, GuestAddress};

use crate::boot::EntryPoint;
use crate::memory::GuestMemory;
use crate::platform::{GDT, PAGE_TABLES};

const PAGE: u64 = 4096;
const ENTRIES_PER_TABLE: u64 = 512;
const LARGE_PAGE: u64 = 2 << 20;
const PRESENT_WRITABLE: u64 = 0x3;
const LARGE: u64 = 0x80;

/// The boot protocol's `__BOOT_CS` and `__BOOT_DS`.
const CODE_SELECTOR: u16 = 0x10;
const DATA_SELECTOR: u16 = 0x18;
const TASK_SELECTOR: u16 = 0x20;

const CR0_PROTECTED: u64 = 1;
const CR0_EXTENSION_TYPE: u64 = 1 << 4;
const CR0_PAGING: u64 = 1 << 31;
const CR4_PHYSICAL_ADDRESS_EXTENSION: u64 = 1 << 5;
const EFER_LONG_MODE_ENABLE: u64 = 1 << 8;
const EFER_LONG_MODE_ACTIVE: u64 = 1 << 10;
const RFLAGS_RESERVED: u64 = 1 << 1;

const MSR_IA32_MISC_ENABLE: u32 = 0x1a0;
const MISC_ENABLE_FAST_STRING: u64 = 1;
const MSR_MTRR_DEFAULT_TYPE: u32 = 0x2ff;
const MTRR_ENABLED: u64 = 1 << 11;
const MTRR_WRITE_BACK: u64 = 6;

const APIC_LVT0: usize = 0x350;
const APIC_LVT1: usize = 0x360;
const APIC_MODE_NMI: u32 = 4 << 8;
const APIC_MODE_EXTINT: u32 = 7 << 8;

const LEAF_FEATURES: u32 = 0x1;
const LEAF_CACHES: u32 = 0x4;
const LEAF_TOPOLOGY: u32 = 0xb;
const LEAF_TOPOLOGY_V2: u32 = 0x1f;
const LEAF_AMD_SIZES: u32 = 0x8000_0008;
const LEAF_AMD_TOPOLOGY: u32 = 0x8000_001e;
const FEATURE_ECX_TSC_DEADLINE: u32 = 1 << 24;
const FEATURE_ECX_HYPERVISOR: u32 = 1 << 31;
const FEATURE_EDX_HTT: u32 = 1 << 28;
const TOPOLOGY_THREADS: u32 = 1;
const TOPOLOGY_CORES: u32 = 2;

/// Why a vCPU's registers cannot be set.
#[derive(Debug, Error)]
pub enum CpuStateError {
    /// KVM refused.
    #[error("KVM refused a vCPU's {what}")]
    Kvm {
        /// Which registers.
        what: &'static str,
        /// KVM's error.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// Fewer model-specific registers were set than given.
    #[error("KVM set only {0} of a vCPU's model-specific registers")]
    Msrs(usize),
    /// KVM's structures are too small for the list.
    #[error("KVM's lists cannot hold a vCPU's registers")]
    List(#[source] vmm_sys_util::fam::Error),
    /// The boot tables' area is not in guest memory.
    #[error("cannot write the boot tables")]
    Memory(#[from] vm_memory::GuestMemoryError),
}

fn refused(what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> CpuStateError {
    move |source| CpuStateError::Kvm { what, source }
}

/// Returns the CPUID that all vCPUs have in common.
pub fn supported_cpuid(kvm: &Kvm) -> Result<CpuId, CpuStateError> {
    let mut cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(refused("CPUID"))?;
    let deadline = kvm.check_extension(Cap::TscDeadlineTimer);
    for entry in cpuid.as_mut_slice().iter_mut().filter(|entry| entry.function == LEAF_FEATURES) {
        entry.ecx |= FEATURE_ECX_HYPERVISOR;
        if deadline {
            entry.ecx |= FEATURE_ECX_TSC_DEADLINE;
        }
    }
    Ok(cpuid)
}

/// Returns the CPUID of vCPU `id` of `cpus`: one socket, one thread per core.
fn cpuid_of(common: &CpuId, id: u8, cpus: u8) -> Result<CpuId, CpuStateError> {
    let mut entries: Vec<kvm_cpuid_entry2> = common
        .as_slice()
        .iter()
        .filter(|entry| !matches!(entry.function, LEAF_TOPOLOGY | LEAF_TOPOLOGY_V2))
        .copied()
        .collect();
    for entry in &mut entries {
        name_processor(entry, id, cpus);
    }
    let highest = entries.iter().find(|entry| entry.function == 0).map_or(0, |entry| entry.eax);
    for function in [LEAF_TOPOLOGY, LEAF_TOPOLOGY_V2].into_iter().filter(|leaf| *leaf <= highest) {
        entries.extend(topology(function, id, cpus));
    }
    CpuId::from_entries(&entries).map_err(CpuStateError::List)
}

/// Returns how many bits of an APIC ID identify a core in a socket of `cpus` cores.
fn core_bits(cpus: u8) -> u32 {
    u32::from(cpus).next_power_of_two().trailing_zeros()
}

fn name_processor(entry: &mut kvm_cpuid_entry2, id: u8, cpus: u8) {
    match entry.function {
        LEAF_FEATURES => {
            entry.ebx = (entry.ebx & 0xffff) | u32::from(cpus) << 16 | u32::from(id) << 24;
            if cpus > 1 {
                entry.edx |= FEATURE_EDX_HTT;
            } else {
                entry.edx &= !FEATURE_EDX_HTT;
            }
        }
        // Cores in the socket (bits 31-26), threads that share the cache (bits 25-14): one at levels 1 and 2.
        LEAF_CACHES if entry.eax & 0x1f != 0 => {
            let sharing = if entry.eax >> 5 & 0x7 < 3 { 0 } else { u32::from(cpus - 1) };
            entry.eax = (entry.eax & 0x3fff) | sharing << 14 | u32::from(cpus - 1) << 26;
        }
        LEAF_AMD_SIZES => entry.ecx = u32::from(cpus - 1) | core_bits(cpus) << 12,
        LEAF_AMD_TOPOLOGY => {
            entry.eax = u32::from(id);
            entry.ebx = u32::from(id);
            entry.ecx = 0;
        }
        _ => {}
    }
}

/// Returns the sub-leaves of an extended topology leaf: threads, cores, end.
fn topology(function: u32, id: u8, cpus: u8) -> [kvm_cpuid_entry2; 3] {
    let sub_leaf = |index: u32, shift: u32, processors: u32, kind: u32| kvm_cpuid_entry2 {
        function,
        index,
        flags: kvm_bindings::KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
        eax: shift,
        ebx: processors,
        ecx: index | kind << 8,
        edx: u32::from(id),
        ..kvm_cpuid_entry2::default()
    };
    [
        sub_leaf(0, 0, 1, TOPOLOGY_THREADS),
        sub_leaf(1, core_bits(cpus), u32::from(cpus), TOPOLOGY_CORES),
        sub_leaf(2, 0, 0, 0),
    ]
}

/// Writes the boot CPU's page tables and descriptor table.
pub fn write_boot_tables(memory: &GuestMemory) -> Result<(), CpuStateError> {
    let pointers = PAGE_TABLES + PAGE;
    let directories = pointers + PAGE;
    memory.write_obj(pointers | PRESENT_WRITABLE, GuestAddress(PAGE_TABLES))?;
    for gib in 0..4 {
        let directory = directories + gib * PAGE;
        memory.write_obj(directory | PRESENT_WRITABLE, GuestAddress(pointers + gib * 8))?;
        for index in 0..ENTRIES_PER_TABLE {
            let frame = (gib * ENTRIES_PER_TABLE + index) * LARGE_PAGE;
            memory.write_obj(frame | PRESENT_WRITABLE | LARGE, GuestAddress(directory + index * 8))?;
        }
    }
    for segment in [code_segment(), data_segment(), task_segment()] {
        memory.write_obj(descriptor(&segment), GuestAddress(GDT + u64::from(segment.selector)))?;
    }
    Ok(())
}

fn code_segment() -> kvm_segment {
    kvm_segment { selector: CODE_SELECTOR, type_: 0xb, l: 1, db: 0, ..data_segment() }
}

fn data_segment() -> kvm_segment {
    kvm_segment {
        limit: u32::MAX,
        selector: DATA_SELECTOR,
        type_: 0x3,
        present: 1,
        s: 1,
        db: 1,
        g: 1,
        ..kvm_segment::default()
    }
}

fn task_segment() -> kvm_segment {
    kvm_segment { limit: 0x67, selector: TASK_SELECTOR, type_: 0xb, present: 1, ..kvm_segment::default() }
}

/// Encodes a flat segment (base 0) for the descriptor table.
fn descriptor(segment: &kvm_segment) -> u64 {
    let limit = u64::from(if segment.g == 1 { segment.limit >> 12 } else { segment.limit });
    limit & 0xffff
        | u64::from(segment.type_) << 40
        | u64::from(segment.s) << 44
        | u64::from(segment.present) << 47
        | (limit >> 16) << 48
        | u64::from(segment.l) << 53
        | u64::from(segment.db) << 54
        | u64::from(segment.g) << 55
}

/// Sets up vCPU `id` of `cpus`. Only the boot CPU gets an `entry`; it needs the boot tables.
pub fn set_up(
    vcpu: &VcpuFd,
    common: &CpuId,
    id: u8,
    cpus: u8,
    entry: Option<EntryPoint>,
) -> Result<(), CpuStateError> {
    vcpu.set_cpuid2(&cpuid_of(common, id, cpus)?).map_err(refused("CPUID"))?;
    set_msrs(vcpu)?;
    set_local_interrupts(vcpu, id == 0)?;
    let Some(entry) = entry else { return Ok(()) };
    let mut special = vcpu.get_sregs().map_err(refused("special registers"))?;
    special.cs = code_segment();
    for segment in [&mut special.ds, &mut special.es, &mut special.fs, &mut special.gs, &mut special.ss] {
        *segment = data_segment();
    }
    special.tr = task_segment();
    special.gdt.base = GDT;
    special.gdt.limit = TASK_SELECTOR + 7;
    special.idt.base = 0;
    special.idt.limit = 0;
    special.cr0 = CR0_PROTECTED | CR0_EXTENSION_TYPE | CR0_PAGING;
    special.cr3 = PAGE_TABLES;
    special.cr4 = CR4_PHYSICAL_ADDRESS_EXTENSION;
    special.efer = EFER_LONG_MODE_ENABLE | EFER_LONG_MODE_ACTIVE;
    vcpu.set_sregs(&special).map_err(refused("special registers"))?;
    let general = kvm_regs {
        rip: entry.instruction,
        rsi: entry.boot_parameters,
        rflags: RFLAGS_RESERVED,
        ..kvm_regs::default()
    };
    vcpu.set_regs(&general).map_err(refused("general registers"))
}

fn set_msrs(vcpu: &VcpuFd) -> Result<(), CpuStateError> {
    let entry = |index, data| kvm_msr_entry { index, data, ..kvm_msr_entry::default() };
    let entries = [
        entry(MSR_IA32_MISC_ENABLE, MISC_ENABLE_FAST_STRING),
        entry(MSR_MTRR_DEFAULT_TYPE, MTRR_ENABLED | MTRR_WRITE_BACK),
    ];
    let msrs = Msrs::from_entries(&entries).map_err(CpuStateError::List)?;
    match vcpu.set_msrs(&msrs).map_err(refused("model-specific registers"))? {
        count if count == entries.len() => Ok(()),
        count => Err(CpuStateError::Msrs(count)),
    }
}

/// Lets NMIs through to each CPU, and the PIC's interrupts to the boot CPU, as firmware leaves the local APICs.
fn set_local_interrupts(vcpu: &VcpuFd, boot_cpu: bool) -> Result<(), CpuStateError> {
    let mut apic = vcpu.get_lapic().map_err(refused("local APIC"))?;
    let mut set = |register: usize, mode: u32| {
        for (slot, byte) in apic.regs[register..].iter_mut().zip(mode.to_le_bytes()) {
            *slot = byte.cast_signed();
        }
    };
    if boot_cpu {
        set(APIC_LVT0, APIC_MODE_EXTINT);
    }
    set(APIC_LVT1, APIC_MODE_NMI);
    vcpu.set_lapic(&apic).map_err(refused("local APIC"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn boot_segments_match_the_boot_protocol() {
        assert_eq!(descriptor(&code_segment()), 0x00af_9b00_0000_ffff);
        assert_eq!(descriptor(&data_segment()), 0x00cf_9300_0000_ffff);
        assert_eq!(descriptor(&task_segment()), 0x0000_8b00_0000_0067);
    }

    #[test]
    fn first_four_gib_are_identity_mapped() {
        let memory = crate::memory::allocate(64 << 20).unwrap();
        write_boot_tables(&memory).unwrap();
        let entry = |address: u64| memory.read_obj::<u64>(GuestAddress(address)).unwrap();
        for address in [0, 0x1234_5678, 0xffff_ffff_u64] {
            let pointers = entry(PAGE_TABLES) & !0xfff;
            let directory = entry(pointers + (address >> 30) * 8) & !0xfff;
            let page = entry(directory + (address >> 21 & 0x1ff) * 8);
            assert_eq!(page, address & !(LARGE_PAGE - 1) | PRESENT_WRITABLE | LARGE);
        }
    }

    #[test]
    fn cpuid_states_the_apic_id_and_topology() {
        let leaf = |function, eax| kvm_cpuid_entry2 { function, eax, ..kvm_cpuid_entry2::default() };
        let common = CpuId::from_entries(&[leaf(0, 0xd), leaf(1, 0), leaf(LEAF_TOPOLOGY, 99)]).unwrap();
        let cpuid = cpuid_of(&common, 5, 6).unwrap();
        let find = |function, index| {
            *cpuid.as_slice().iter().find(|entry| (entry.function, entry.index) == (function, index)).unwrap()
        };
        assert_eq!(find(1, 0).ebx, 5 << 24 | 6 << 16);
        assert_eq!(find(1, 0).edx, FEATURE_EDX_HTT);
        let cores = find(LEAF_TOPOLOGY, 1);
        assert_eq!((cores.eax, cores.ebx, cores.ecx, cores.edx), (3, 6, 0x201, 5));
        assert!(cpuid.as_slice().iter().all(|entry| entry.function != LEAF_TOPOLOGY_V2));
    }

    #[test]
    fn core_bits_cover_the_number_of_processors() {
        assert_eq!([1, 2, 3, 4, 16].map(core_bits), [0, 1, 2, 2, 4]);
    }
}
