//! A quick run of the hand-over benchmark measures every cell and loses no frame.

use std::ffi::OsString;

use baton_tests::process::Process;
use baton_tests::programs;

#[test]
fn quick_run_fills_every_cell_of_the_page() {
    let output = tempfile::tempdir().unwrap();
    let arguments = [OsString::from("--quick"), "--output".into(), output.path().into()];
    let mut bench = Process::start(&programs::bench_handover().unwrap(), &arguments, &[]).unwrap();
    let status = bench.wait().unwrap();
    assert!(status.success(), "{status}; log:\n{}", bench.log());

    let page = std::fs::read_to_string(output.path().join("handover-blackout.md")).unwrap();
    let count = |start: &str, end: &str| {
        page.lines().filter(|line| line.starts_with(start) && line.ends_with(end)).count()
    };
    for cell in [
        "| 1 | 1 | 1 GiB | 2.5 |",
        "| 4 | 1 | 1 GiB | 2.5 |",
        "| 16 | 1 | 1 GiB | 2.5 |",
        "| 64 | 1 | 1 GiB | 2.5 |",
        "| 4 | 4 | 1 GiB | 2.5 |",
        "| 16 | 16 | 1 GiB | 2.5 |",
        "| 64 | 64 | 1 GiB | 2.5 |",
        "| 1 | 1 | 128 MiB | 2.5 |",
        "| 1 | 1 | 8 GiB | 2.5 |",
        "| 1 | 1 | 1 GiB | 0.5 |",
        "| 1 | 1 | 1 GiB | 5 |",
    ] {
        assert_eq!(count(cell, "|"), 2, "{cell} in\n{page}");
        assert_eq!(count(cell, " | 0 / 0 / 0 |"), 1, "{cell} in\n{page}");
    }
    assert_eq!(count("The median blackout grows by ", "up to 64 queue pairs."), 2, "{page}");
    let memory = " with 128 to 8192 MiB of guest memory, otherwise as in the first row.";
    assert_eq!(count("The median blackout is ", memory), 1, "{page}");
    assert_eq!(count("| hand-overs |", " | 0 / 0 / 0 | silent |"), 1, "{page}");
    assert_eq!(count("| control: ", " | 0 / 0 / 0 | silent |"), 1, "{page}");
    let plot = std::fs::read_to_string(output.path().join("handover-blackout.svg")).unwrap();
    assert!(plot.starts_with("<svg") && plot.trim_end().ends_with("</svg>"), "{plot}");
}
