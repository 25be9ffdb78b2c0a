//! A VM and its parts: vCPUs, console, network devices.
//!
//! A machine is created to boot a kernel, or for a VM that migrates here. It is paused until it is resumed. While it is
//! paused, its devices are suspended: their back-ends neither touch the rings nor read their TAPs.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use baton_control::error_chain;
use baton_protocol::control::NetStatus;
use baton_protocol::migration::facts::{MachineFacts, NetFacts};
use baton_protocol::migration::state::{Clock, NetState, Outline, VmState};
use thiserror::Error;

use crate::acpi::{self, AcpiError};
use crate::boot::{self, BootError, EntryPoint};
use crate::config::Config;
use crate::memory::{self, GuestMemory, MemoryError};
use crate::mmio_bus::Bus;
use crate::platform::{
    MAX_VIRTIO_DEVICES, SERIAL_GSI, SERIAL_PORT, SERIAL_PORTS, VIRTIO_MMIO_SIZE, VirtioSlot, virtio_slots,
};
use crate::power::{ACPI_PORT, ACPI_PORTS, AcpiRegisters, EndSignal, I8042, I8042_PORT, I8042_PORTS};
use crate::serial::{SerialError, SharedConsole};
use crate::vcpu::{Buses, VcpuError, Vcpus};
use crate::vcpu_state::{self, VcpuStateError};
use crate::virtio::mmio_transport::{MmioTransport, QUEUE_NOTIFY};
use crate::virtio::net::{Net, NetError, NetShared, NetThread, Worker};
use crate::vm::{Vm, VmError};

/// Why a VM cannot be created, paused, saved or restored.
#[derive(Debug, Error)]
pub enum MachineError {
    /// More network devices than interrupts.
    #[error("{0} network devices exceed the limit of {MAX_VIRTIO_DEVICES}")]
    TooManyDevices(usize),
    /// Guest memory cannot be created.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The kernel cannot be loaded.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// The ACPI tables cannot be written.
    #[error(transparent)]
    Acpi(#[from] AcpiError),
    /// KVM's VM cannot be created, saved or restored.
    #[error(transparent)]
    Vm(#[from] VmError),
    /// The vCPU threads cannot be started.
    #[error(transparent)]
    Vcpus(#[from] VcpuError),
    /// The vCPUs' state cannot be saved or restored.
    #[error(transparent)]
    VcpuState(#[from] VcpuStateError),
    /// The serial port's state cannot be restored.
    #[error(transparent)]
    Serial(#[from] SerialError),
    /// The guest has ended.
    #[error("the guest has ended")]
    GuestEnded,
    /// A device that the VM does not have.
    #[error("there is no network device {0}")]
    NoDevice(usize),
    /// A network device or its back-end failed.
    #[error("back-end at {}", socket.display())]
    Net {
        /// The device's socket.
        socket: PathBuf,
        /// The error.
        #[source]
        source: NetError,
    },
}

/// A network device.
#[derive(Debug)]
pub struct NetDevice {
    thread: NetThread,
    transport: Arc<Mutex<MmioTransport<Net>>>,
}

impl NetDevice {
    /// Returns what the device's thread shares.
    pub fn shared(&self) -> &Arc<NetShared> {
        &self.thread.shared
    }

    fn transport(&self) -> MutexGuard<'_, MmioTransport<Net>> {
        self.transport.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs `task` on the device's worker, and waits for the result.
    pub fn call<T: Send + 'static>(
        &self,
        task: impl FnOnce(&mut Worker) -> Result<T, NetError> + Send + 'static,
    ) -> Result<T, MachineError> {
        let socket = self.shared().socket();
        self.thread
            .mailbox
            .call(task)
            .map_err(|source| MachineError::Net { socket: socket.to_owned(), source })
    }

    fn save(&self) -> Result<NetState, MachineError> {
        let driver = self.call(|worker| Ok(worker.save()))?;
        let (identity, announce) = self.shared().offered();
        Ok(NetState { identity: identity.into(), transport: self.transport().save(), announce, driver })
    }

    fn restore(&self, state: &NetState) -> Result<(), MachineError> {
        let driver = state.clone();
        self.call(move |worker| worker.restore(&driver))?;
        self.transport().restore(&state.transport);
        Ok(())
    }
}

/// A VM and its devices.
#[derive(Debug)]
pub struct Machine {
    // Dropped before `vm`: a vCPU's descriptor keeps KVM's VM alive, which uses guest memory.
    vcpus: Vcpus,
    vm: Vm,
    console: Arc<SharedConsole>,
    net: Vec<NetDevice>,
    msr_indices: Vec<u32>,
    cpus: u8,
    memory: u64,
    moves_tsc: bool,
}

impl Machine {
    /// Creates a VM that boots `kernel`.
    pub fn boot(
        config: &Config,
        kernel: &Path,
        console: Arc<SharedConsole>,
        end: &EndSignal,
    ) -> Result<Self, MachineError> {
        let slots = slots(config)?;
        let ram = memory::ranges(config.memory.0);
        let memory = memory::allocate(config.memory.0)?;
        let entry = boot::load(config, kernel, &memory, &ram)?;
        acpi::write(&memory, config.cpus, &slots)?;
        Self::new(config, Some((memory, entry)), console, end)
    }

    /// Creates a machine for a VM that migrates here. It has no memory yet.
    pub fn incoming(
        config: &Config,
        console: Arc<SharedConsole>,
        end: &EndSignal,
    ) -> Result<Self, MachineError> {
        Self::new(config, None, console, end)
    }

    /// Connects to the back-ends before it opens KVM: a missing back-end is reported on a host without KVM, too.
    fn new(
        config: &Config,
        loaded: Option<(GuestMemory, EntryPoint)>,
        console: Arc<SharedConsole>,
        end: &EndSignal,
    ) -> Result<Self, MachineError> {
        let slots = slots(config)?;
        let (guest, entry) = loaded.unzip();
        let mut started = Vec::new();
        for (index, config) in config.net.iter().enumerate() {
            let device = NetThread::start(format!("net{index}"), config, guest.clone());
            started
                .push(device.map_err(|source| MachineError::Net { socket: config.socket.clone(), source })?);
        }
        let vm = Vm::new()?;
        guest.map_or(Ok(()), |memory| vm.add_memory(memory))?;
        vm.connect_interrupt(&console.interrupt, SERIAL_GSI)?;
        let mut ports = Bus::default();
        ports.insert(u64::from(SERIAL_PORT), u64::from(SERIAL_PORTS), console.device.clone());
        ports.insert(u64::from(ACPI_PORT), ACPI_PORTS, Arc::new(Mutex::new(AcpiRegisters(end.clone()))));
        ports.insert(u64::from(I8042_PORT), I8042_PORTS, Arc::new(Mutex::new(I8042(end.clone()))));
        let mut memory = Bus::default();
        let mut net = Vec::new();
        for ((thread, device), slot) in started.into_iter().zip(slots) {
            connect_device(&vm, &thread.shared, slot)?;
            let transport = Arc::new(Mutex::new(MmioTransport::new(device)));
            memory.insert(slot.address, VIRTIO_MMIO_SIZE, transport.clone());
            net.push(NetDevice { thread, transport });
        }
        let msr_indices = vm.msr_indices()?;
        let vcpus = vm.create_vcpus(config.cpus, entry)?;
        let moves_tsc = vcpus.iter().all(vcpu_state::moves_tsc);
        let vcpus = Vcpus::start(vcpus, &Arc::new(Buses { ports, memory }), end)?;
        let (cpus, memory) = (config.cpus, config.memory.0);
        Ok(Self { vcpus, vm, console, net, msr_indices, cpus, memory, moves_tsc })
    }

    /// Returns the network devices' status for the control socket.
    pub fn net_status(&self) -> Vec<NetStatus> {
        self.net.iter().map(|device| device.shared().status()).collect()
    }

    /// Returns guest memory.
    pub fn memory(&self) -> GuestMemory {
        self.vm.memory()
    }

    /// Adds the memory of a VM that migrates here, and shares it with the back-ends.
    pub fn use_memory(&self, memory: &GuestMemory) -> Result<(), MachineError> {
        self.vm.add_memory(memory.clone())?;
        self.net.iter().try_for_each(|device| {
            let memory = memory.clone();
            device.call(|worker| worker.use_memory(memory))
        })
    }

    /// Returns what the target of a migration checks about this VM. Pauses the vCPUs briefly.
    pub fn source_facts(&self, local: bool) -> MachineFacts {
        MachineFacts { nested: self.vcpus.any_nested(), ..self.facts(self.source_net_facts(local)) }
    }

    /// Returns what this VMM, as the target of a migration, compares with the source's facts.
    pub fn target_facts(&self, local: bool) -> MachineFacts {
        let facts = |shared: &Arc<NetShared>| shared.target_facts(local && shared.moves_locally());
        self.facts(self.net.iter().map(NetDevice::shared).map(facts).collect())
    }

    /// Returns what the target of a migration checks about this VM's network devices.
    pub fn source_net_facts(&self, local: bool) -> Vec<NetFacts> {
        let facts = |shared: &Arc<NetShared>| shared.source_facts(local && shared.moves_locally());
        self.net.iter().map(NetDevice::shared).map(facts).collect()
    }

    fn facts(&self, net: Vec<NetFacts>) -> MachineFacts {
        MachineFacts { cpus: self.cpus, memory: self.memory, moves_tsc: self.moves_tsc, nested: false, net }
    }

    /// Pauses the vCPUs. Fails if the guest has ended.
    pub fn pause_vcpus(&self) -> Result<(), MachineError> {
        self.vcpus.pause();
        if self.vcpus.all_alive() { Ok(()) } else { Err(MachineError::GuestEnded) }
    }

    /// Returns network device `device`.
    pub fn device(&self, device: usize) -> Result<&NetDevice, MachineError> {
        self.net.get(device).ok_or(MachineError::NoDevice(device))
    }

    /// Returns what the driver of each network device has set up.
    pub fn outlines(&self) -> Result<Vec<Option<Outline>>, MachineError> {
        self.net.iter().map(|device| device.call(|worker| Ok(worker.outline()))).collect()
    }

    /// Stops the devices from reconnecting to lost back-ends, after the VM has migrated to another VMM.
    pub fn retire(&self) {
        for device in &self.net {
            device.thread.mailbox.send(Worker::retire);
        }
    }

    /// Suspends the devices. The vCPUs must be paused.
    pub fn suspend_devices(&self) -> Result<(), MachineError> {
        for device in &self.net {
            device.call(|worker| {
                worker.suspend();
                Ok(())
            })?;
        }
        Ok(())
    }

    /// Pauses the vCPUs, then suspends the devices. Resumes the VM if that fails.
    pub fn pause(&self) -> Result<(), MachineError> {
        // If the guest ends meanwhile, the main thread handles that.
        self.vcpus.pause();
        self.suspend_devices().inspect_err(|_| self.resume())
    }

    /// Resumes the devices, then the vCPUs. A device fails here only if its thread has ended. The guest then runs
    /// without it.
    pub fn resume(&self) {
        for device in &self.net {
            let resumed = device.call(|worker| {
                worker.resume();
                Ok(())
            });
            if let Err(error) = resumed {
                tracing::warn!("{}", error_chain(&error));
            }
        }
        self.vcpus.notify_paused();
        self.vcpus.resume();
    }

    /// Starts a VM that boots.
    pub fn start(&self) {
        self.vcpus.resume();
    }

    /// Returns the state of a paused VM.
    pub fn save(&self) -> Result<VmState, MachineError> {
        Ok(VmState {
            vcpus: self.vcpus.save(&self.msr_indices)?,
            platform: self.vm.save()?,
            serial: self.console.save(),
            net: self.net.iter().map(NetDevice::save).collect::<Result<_, _>>()?,
        })
    }

    /// Restores the state of a VM that has its memory and has never run. The caller then calls [`Self::set_clock`] and
    /// [`Self::resume`]. Devices that are not `local` have a new place in the network, so this asks their drivers to
    /// announce their addresses.
    pub fn restore(&self, state: &VmState, local: &[bool]) -> Result<(), MachineError> {
        self.vcpus.pause();
        self.vcpus.restore(&state.vcpus)?;
        self.vm.restore(&state.platform)?;
        self.console.restore(&state.serial)?;
        for ((device, state), &local) in self.net.iter().zip(&state.net).zip(local) {
            device.restore(state)?;
            if !local {
                device.shared().announce();
            }
        }
        Ok(())
    }

    /// Sets the guest's clock as if it had not been paused.
    pub fn set_clock(&self, clock: Clock) -> Result<(), MachineError> {
        Ok(self.vm.set_clock(clock)?)
    }

    /// Ends the devices' connections and the vCPUs. A second call does nothing.
    pub fn stop(&self) {
        // The connections first, so that a vCPU that waits for a back-end can end.
        self.net.iter().for_each(|device| device.thread.stop());
        self.vcpus.stop();
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // The vCPUs must end before guest memory is unmapped.
        self.stop();
    }
}

fn slots(config: &Config) -> Result<Vec<VirtioSlot>, MachineError> {
    let slots: Vec<_> = virtio_slots(config.net.len()).collect();
    if slots.len() < config.net.len() {
        return Err(MachineError::TooManyDevices(config.net.len()));
    }
    Ok(slots)
}

/// Connects a device's doorbells and interrupts to the guest through KVM, bypassing the VMM.
fn connect_device(vm: &Vm, shared: &NetShared, slot: VirtioSlot) -> Result<(), VmError> {
    let doorbell = slot.address + QUEUE_NOTIFY;
    for (queue, kick) in (0u32..).zip(&shared.kicks) {
        vm.connect_doorbell(kick, doorbell, queue)?;
    }
    for interrupt in shared.calls.iter().chain([shared.events.interrupt()]) {
        vm.connect_interrupt(interrupt, slot.gsi)?;
    }
    Ok(())
}
