//! baton-vmm by itself: kernels, processors, memory, devices, the control socket, and how a guest ends.

use std::ffi::OsString;
use std::net::Ipv4Addr;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use baton_control::ControlClient;
use baton_protocol::control::{Request, VmmState, VmmStatus};
use baton_tests::datapath::Datapath;
use baton_tests::guest::Vmm;
use baton_tests::link::{GUEST, HOST, Link, MAC, Meeting, Network, PORT, TAP, bring_up, ip};
use baton_tests::process::Process;
use baton_tests::{images, lab, ping, programs, reference_backend};

#[test]
fn boots_a_bzimage() -> Result<()> {
    lab::run(|| {
        let mut guest = Vmm::with_kernel(&images::guest_kernel()?, 2, "512M")?.start("guest")?;
        guest.wait_for_shell()?;
        ensure!(guest.check("nproc")? == "2\n");
        ensure!(guest.power_off()?.success());
        Ok(())
    })
}

#[test]
fn boots_sixteen_processors() -> Result<()> {
    lab::run(|| {
        let mut guest = Vmm::new(16, "1G")?.start("guest")?;
        guest.wait_for_shell()?;
        ensure!(guest.check("nproc")? == "16\n");
        ensure!(guest.power_off()?.success());
        Ok(())
    })
}

#[test]
fn has_memory_above_4_gib() -> Result<()> {
    lab::run(|| {
        let mut guest = Vmm::new(1, "5G")?.start("guest")?;
        guest.wait_for_shell()?;
        let text = guest.check("awk '/MemTotal/ { print $2 }' /proc/meminfo")?;
        let kibibytes: u64 = text.trim().parse().with_context(|| format!("{text:?} is not a number"))?;
        ensure!(kibibytes > 4_700_000, "the guest has {kibibytes} KiB");
        ensure!(guest.check("grep 'System RAM' /proc/iomem")?.contains("100000000-"));
        ensure!(guest.power_off()?.success());
        Ok(())
    })
}

#[test]
fn guest_reset_ends_the_vmm_successfully() -> Result<()> {
    lab::run(|| {
        let mut guest = Vmm::new(1, "512M")?.start("guest")?;
        guest.wait_for_shell()?;
        guest.type_line("reboot -f")?;
        ensure!(guest.wait()?.success());
        Ok(())
    })
}

#[test]
fn triple_fault_is_reported_in_one_line() -> Result<()> {
    lab::run(|| {
        // With `reboot=t` the kernel reboots by a triple fault.
        let mut guest = Vmm::new(1, "512M")?.parameters("reboot=t").start("guest")?;
        guest.wait_for_shell()?;
        guest.type_line("reboot -f")?;
        let log = guest.log_path();
        let status = guest.wait()?;
        let text = std::fs::read_to_string(log)?;
        ensure!(status.code() == Some(1), "{status}: {text}");
        ensure!(text.to_lowercase().contains("triple fault") && text.lines().count() == 1, "{text}");
        Ok(())
    })
}

#[test]
fn missing_back_end_is_reported_in_one_line() -> Result<()> {
    lab::run(|| {
        let output = Command::new(programs::vmm()?)
            .arg("--kernel")
            .arg(images::guest_vmlinux()?)
            .args(["--net", "socket=/nonexistent/socket"])
            .output()?;
        let text = String::from_utf8(output.stderr)?;
        ensure!(output.status.code() == Some(1), "{}: {text}", output.status);
        ensure!(text.contains("/nonexistent/socket") && text.lines().count() == 1, "{text}");
        Ok(())
    })
}

#[test]
fn serves_several_devices() -> Result<()> {
    const MAC2: &str = "02:ba:70:00:00:03";
    lab::run(|| {
        let mut link = Link::new(Datapath::Userspace, Meeting::BackendListens, 1)?;
        let directory = tempfile::tempdir()?;
        let socket = directory.path().join("second");
        let arguments = [format!("--socket-path={}", socket.display()), "--tap=tap1".to_owned()];
        let arguments = arguments.map(OsString::from);
        let mut second = Process::start(&programs::backend()?, &arguments, &[])?;
        second.connect(&socket)?;
        ip(&["addr", "add", "192.168.78.1/24", "dev", "tap1"])?;
        ip(&["link", "set", "tap1", "up"])?;
        let socket = socket.to_str().context("a path that is not UTF-8")?;
        let vmm = Vmm::new(1, "512M")?.net(link.socket()?, MAC, 1).net(socket, MAC2, 1);
        let mut guest = vmm.start("guest")?;
        guest.wait_for_shell()?;
        link.bring_up(&mut guest)?;
        ensure!(guest.check("cat /sys/class/net/eth1/address")?.trim() == MAC2);
        guest.check("ip addr add 192.168.78.2/24 dev eth1; ip link set eth1 up")?;
        link.check_pings(&mut guest, 20)?;
        ping::check(Ipv4Addr::new(192, 168, 78, 2), 20)?;
        link.check_healthy()?;
        ensure!(guest.power_off()?.success());
        Ok(())
    })
}

#[test]
fn works_with_the_reference_back_end() -> Result<()> {
    lab::run(|| {
        let _network = Network::new(false)?;
        let mut backend = reference_backend::Program::start(TAP)?;
        let mut body = || {
            let socket = backend.socket.to_str().context("a path that is not UTF-8")?;
            let mut guest = Vmm::new(1, "512M")?.net(socket, MAC, 1).start("guest")?;
            guest.wait_for_shell()?;
            bring_up(&mut guest, 1)?;
            ping::check(GUEST, 100)?;
            guest.check_pings(HOST, 100)?;
            for direction in ["up", "down"] {
                guest.check(&format!(
                    "traffic bulk {HOST}:{PORT} --direction={direction} --bytes={}",
                    4 << 20
                ))?;
            }
            ensure!(guest.power_off()?.success());
            ensure!(backend.process.is_running()?);
            Ok(())
        };
        let result = body();
        result.with_context(|| backend.process.log())
    })
}

#[test]
fn reports_status_pauses_and_resumes() -> Result<()> {
    lab::run(|| {
        let mut link = Link::new(Datapath::Userspace, Meeting::BackendListens, 2)?;
        let directory = tempfile::tempdir()?;
        let path = directory.path().join("control");
        let option = format!("--control-socket={}", path.display());
        let mut guest =
            Vmm::new(2, "512M")?.net(link.socket()?, MAC, 2).args([option.as_str()]).start("guest")?;
        guest.wait_for_shell()?;
        link.bring_up(&mut guest)?;
        let mut control = ControlClient::connect(&path)?;
        let mut ask = |request| control.call(&request).context("the VMM's answer");
        let status: VmmStatus = serde_json::from_value(ask(Request::Status)?)?;
        ensure!(
            status.state == VmmState::Running && status.cpus == 2 && status.memory == 512 << 20,
            "{status:?}"
        );
        ensure!(status.net.len() == 1 && status.net[0].active_queue_pairs == 2, "{status:?}");
        for _ in 0..3 {
            ask(Request::Pause)?;
            let status: VmmStatus = serde_json::from_value(ask(Request::Status)?)?;
            ensure!(status.state == VmmState::Paused, "{status:?}");
            ask(Request::Resume)?;
            link.check_pings(&mut guest, 10)?;
        }
        ask(Request::Quit)?;
        ensure!(guest.wait()?.success());
        link.check_healthy()
    })
}
