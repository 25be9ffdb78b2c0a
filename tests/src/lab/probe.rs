//! Probes whether this machine needs the lab, and how many labs it has resources for.
//!
//! The presence of `/dev/kvm` proves little: some hypervisors provide it without hardware support, and interpret the
//! guest's instructions, a thousand times slower and incompletely. So the probe measures how long a guest takes to
//! count down from a million.

#![expect(unsafe_code, reason = "passes guest memory to KVM")]

use std::fs::{self, OpenOptions};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use kvm_bindings::{
    KVM_CAP_VCPU_ATTRIBUTES, KVM_MAX_CPUID_ENTRIES, kvm_pit_config, kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, Kvm, VcpuExit};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

/// The limit for counting. Hardware takes 1 ms, nested or emulated hardware some 10 ms, an interpreter over a second.
const PATIENCE: Duration = Duration::from_millis(300);

/// Returns whether KVM can run Linux, and whether this process is root and can open vhost-net and TAPs.
pub(super) fn has_all() -> bool {
    let opens = |path| OpenOptions::new().read(true).write(true).open(path).is_ok();
    nix::unistd::geteuid().is_root()
        && opens("/dev/vhost-net")
        && opens("/dev/net/tun")
        && time_to_count().is_ok_and(|time| time < PATIENCE)
}

/// Checks that this process is root and can open TAPs, and that KVM can create a VM as baton-vmm does. It may be unable
/// to run one.
pub(super) fn creates_vms() -> Result<()> {
    ensure!(nix::unistd::geteuid().is_root(), "not root");
    OpenOptions::new().read(true).write(true).open("/dev/net/tun").context("cannot open /dev/net/tun")?;
    let kvm = Kvm::new().context("cannot open /dev/kvm")?;
    for capability in [Cap::UserMemory, Cap::Ioeventfd, Cap::Irqfd, Cap::ImmediateExit] {
        ensure!(kvm.check_extension(capability), "KVM lacks {capability:?}");
    }
    let vm = kvm.create_vm().context("cannot create a VM")?;
    vm.create_irq_chip().context("cannot create interrupt controllers")?;
    vm.create_pit2(kvm_pit_config::default()).context("cannot create a timer")?;
    let vcpu = vm.create_vcpu(0).context("cannot create a vCPU")?;
    let cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).context("cannot read the CPUID")?;
    vcpu.set_cpuid2(&cpuid).context("cannot set the CPUID")?;
    let attributes = vm.check_extension_raw(KVM_CAP_VCPU_ATTRIBUTES.into());
    ensure!(attributes > 0, "KVM cannot move the time stamp counter");
    Ok(())
}

/// The maximum number of labs: nextest runs as many tests in labs at a time (`.config/nextest.toml`).
const MOST: usize = 2;

/// The memory that a lab may use, in KiB: that of its machine, and QEMU's own.
const NEEDED: usize = 6 << 20;

/// Returns how many labs this machine has processors and memory for, but at least one.
pub(super) fn room() -> usize {
    let processors = thread::available_parallelism().map_or(1, usize::from);
    let memory = fs::read_to_string("/proc/meminfo").ok().and_then(|text| available(&text)).unwrap_or(0);
    processors.min(memory / NEEDED).clamp(1, MOST)
}

/// Parses the line `MemAvailable:    1234 kB` of /proc/meminfo.
fn available(meminfo: &str) -> Option<usize> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.split_whitespace().next()?.parse().ok()
}

/// Measures how long a guest takes to count from a million down to zero.
fn time_to_count() -> Result<Duration> {
    const START: u64 = 0x1000;
    const CODE: [u8; 11] = [
        0x66, 0xb9, 0x40, 0x42, 0x0f, 0x00, // mov ecx, 1000000
        0x66, 0x49, // again: dec ecx
        0x75, 0xfc, // jnz again
        0xf4, // hlt
    ];
    let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 0x2000)])?;
    memory.write_slice(&CODE, GuestAddress(START))?;
    let host = memory.get_host_address(GuestAddress(0))?;

    let kvm = Kvm::new().context("cannot open /dev/kvm")?;
    let vm = kvm.create_vm()?;
    let region = kvm_userspace_memory_region {
        slot: 0,
        guest_phys_addr: 0,
        memory_size: 0x2000,
        userspace_addr: host.expose_provenance() as u64,
        flags: 0,
    };
    // SAFETY: `memory` maps these 0x2000 bytes and outlives `vm`, which is dropped before it.
    unsafe { vm.set_user_memory_region(region) }?;
    let mut vcpu = vm.create_vcpu(0)?;
    let mut segments = vcpu.get_sregs()?;
    segments.cs.base = 0;
    segments.cs.selector = 0;
    vcpu.set_sregs(&segments)?;
    let mut registers = vcpu.get_regs()?;
    registers.rip = START;
    registers.rflags = 2;
    vcpu.set_regs(&registers)?;

    let start = Instant::now();
    match vcpu.run()? {
        VcpuExit::Hlt => Ok(start.elapsed()),
        exit => bail!("unexpected exit of the counting guest: {exit:?}"),
    }
}
