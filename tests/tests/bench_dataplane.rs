//! The dataplane benchmark works: it measures each back-end in each scenario and writes its page.

use std::ffi::OsString;

use baton_tests::bench::dataplane::peer::Peer;
use baton_tests::bench::dataplane::scenario;
use baton_tests::process::Process;
use baton_tests::programs;

#[test]
fn quick_run_measures_every_back_end_in_every_scenario() {
    let output = tempfile::tempdir().unwrap();
    let arguments = [OsString::from("--quick"), "--output".into(), output.path().into()];
    let mut bench = Process::start(&programs::bench_dataplane().unwrap(), &arguments, &[]).unwrap();
    let status = bench.wait().unwrap();
    assert!(status.success(), "{status}; it wrote:\n{}", bench.log());

    let page = std::fs::read_to_string(output.path().join("performance.md")).unwrap();
    let peers = Peer::standard().unwrap();
    let lines: Vec<_> = page.lines().collect();
    for scenario in scenario::ALL.iter().filter(|scenario| !scenario.is_ping_pong()) {
        // The first table with such a row has a column for each back-end.
        let row = lines.iter().find(|line| line.starts_with(&format!("| {} |", scenario.name())));
        let columns: Vec<_> =
            row.unwrap_or_else(|| panic!("no {} in\n{page}", scenario.name())).split('|').collect();
        for (peer, column) in peers.iter().zip(&columns[2..]) {
            let measured = !column.contains('—');
            assert!(!measured || peer.can(scenario), "{} of {}: {column}", scenario.name(), peer.name);
            let is_own = peer.name == "Baton" || peer.is_bare();
            assert!(measured || !is_own || !peer.can(scenario), "no {} of {}", scenario.name(), peer.name);
        }
    }
    for picture in ["dataplane.svg", "dataplane-latency.svg"] {
        let text = std::fs::read_to_string(output.path().join(picture)).unwrap();
        assert!(text.starts_with("<svg") && text.trim_end().ends_with("</svg>"), "{text}");
    }
    let cells = std::fs::read(output.path().join("dataplane.json")).unwrap();
    let cells: Vec<serde_json::Value> = serde_json::from_slice(&cells).unwrap();
    assert_eq!(cells.len(), scenario::ALL.len() * peers.len());
}
