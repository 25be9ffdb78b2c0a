//! Draws the results as SVG: bars of the back-ends' efficiency, and the distribution of the frames' times.

use std::path::Path;

use anyhow::{Result, anyhow};
use plotters::coord::Shift;
use plotters::drawing::DrawingArea;
use plotters::prelude::{
    ChartBuilder, Color, IntoDrawingArea, IntoLogRange, IntoSegmentedCoord, LineSeries, RGBColor, Rectangle,
    SVGBackend, SegmentValue, WHITE,
};

use super::run::Cell;
use super::scenario::{Scenario, Traffic};

/// A colour for each back-end.
const COLOURS: [RGBColor; 6] = [
    RGBColor(31, 119, 180),
    RGBColor(255, 127, 14),
    RGBColor(44, 160, 44),
    RGBColor(140, 140, 140),
    RGBColor(90, 90, 90),
    RGBColor(148, 103, 189),
];

type Panel<'a> = DrawingArea<SVGBackend<'a>, Shift>;
type Drawn = Result<(), Box<dyn std::error::Error>>;

/// Draws the work per second of processor time, for each scenario with a full load, a driver that polls and one queue
/// pair.
///
/// # Errors
/// Returns an error if the file cannot be written.
pub fn bars(path: &Path, cells: &[Cell]) -> Result<()> {
    let scenarios: Vec<Scenario> = unique(cells)
        .into_iter()
        .filter(|scenario| {
            let one_way =
                matches!(scenario.traffic, Traffic::Transmit | Traffic::Receive | Traffic::ThereAndBack);
            one_way && !scenario.sleeps && scenario.pairs == 1
        })
        .collect();
    let columns = 5;
    let rows = scenarios.len().div_ceil(columns);
    let height = u32::try_from(rows)? * 240 + 40;
    draw(path, (1280, height), |area| {
        let (names, area) = area.split_vertically(30);
        legend(&names, cells, &scenarios)?;
        for (panel, scenario) in area.split_evenly((rows, columns)).iter().zip(&scenarios) {
            let row = cells.iter().filter(|cell| cell.scenario == *scenario);
            let values: Vec<_> = row
                .enumerate()
                .filter_map(|(nth, cell)| {
                    let spread = cell.spread(|outcome| outcome.efficiency(scenario))?;
                    Some((nth, spread.median))
                })
                .collect();
            bar_chart(panel, scenario, &values)?;
        }
        Ok(())
    })
}

fn bar_chart(panel: &Panel<'_>, scenario: &Scenario, values: &[(usize, f64)]) -> Drawn {
    let highest = values.iter().map(|(_, value)| *value).fold(1.0, f64::max);
    let count = i32::try_from(values.len())?;
    let mut chart = ChartBuilder::on(panel)
        .margin(6)
        .caption(scenario.name(), ("sans-serif", 12))
        .y_label_area_size(64)
        .build_cartesian_2d((0..count).into_segmented(), 0.0..highest * 1.1)?;
    let unit = if scenario.is_large() { "Gb / CPU-s" } else { "thousand / CPU-s" };
    chart
        .configure_mesh()
        .disable_x_axis()
        .disable_x_mesh()
        .y_desc(unit)
        .y_labels(5)
        .light_line_style(WHITE)
        .draw()?;
    for (place, (nth, value)) in (0i32..).zip(values) {
        let colour = COLOURS[nth % COLOURS.len()];
        let corners = [(SegmentValue::Exact(place), 0.0), (SegmentValue::Exact(place + 1), *value)];
        let mut bar = Rectangle::new(corners, colour.filled());
        bar.set_margin(0, 0, 3, 3);
        chart.draw_series([bar])?;
    }
    Ok(())
}

/// Draws the cumulative distribution of the frames' times in the ping-pong scenarios.
///
/// # Errors
/// Returns an error if the file cannot be written.
pub fn times(path: &Path, cells: &[Cell]) -> Result<()> {
    let scenarios: Vec<_> = unique(cells).into_iter().filter(Scenario::is_ping_pong).collect();
    draw(path, (1280, 420), |area| {
        let (names, area) = area.split_vertically(30);
        legend(&names, cells, &scenarios)?;
        for (panel, scenario) in area.split_evenly((1, scenarios.len().max(1))).iter().zip(&scenarios) {
            time_chart(panel, scenario, cells)?;
        }
        Ok(())
    })
}

#[expect(clippy::cast_precision_loss, reason = "coordinates in a picture")]
fn time_chart(panel: &Panel<'_>, scenario: &Scenario, cells: &[Cell]) -> Drawn {
    let row: Vec<_> = cells.iter().filter(|cell| cell.scenario == *scenario).enumerate().collect();
    let lines: Vec<(usize, Vec<(f64, f64)>)> = row
        .iter()
        .filter(|(_, cell)| !cell.outcomes.is_empty())
        .map(|(nth, cell)| {
            let mut times: Vec<_> =
                cell.outcomes.iter().flat_map(|outcome| &outcome.times).copied().collect();
            times.sort_unstable();
            let step = (times.len() / 500).max(1);
            let count = times.len().max(1) as f64;
            let points = times.iter().enumerate().step_by(step);
            (*nth, points.map(|(rank, time)| (*time as f64 / 1e3, rank as f64 / count)).collect())
        })
        .collect();
    let places = lines.iter().flat_map(|(_, points)| points.iter().map(|(time, _)| *time));
    let (least, most) =
        places.fold((1000.0_f64, 10.0_f64), |(least, most), time| (least.min(time), most.max(time)));
    let mut chart = ChartBuilder::on(panel)
        .margin(10)
        .caption(scenario.name(), ("sans-serif", 14))
        .x_label_area_size(36)
        .y_label_area_size(52)
        .build_cartesian_2d((least.max(0.5)..most * 1.1).log_scale(), 0.0..1.0)?;
    chart
        .configure_mesh()
        .x_desc("round trip, µs")
        .y_desc("fraction of frames")
        .x_label_formatter(&|value| format!("{value:.0}"))
        .light_line_style(WHITE)
        .draw()?;
    for (nth, points) in lines {
        chart.draw_series(LineSeries::new(points, COLOURS[nth % COLOURS.len()].stroke_width(2)))?;
    }
    Ok(())
}

/// Draws the names of the back-ends that have a result in one of `scenarios` in a row.
fn legend(panel: &Panel<'_>, cells: &[Cell], scenarios: &[Scenario]) -> Drawn {
    let mut chart = ChartBuilder::on(panel).build_cartesian_2d(0.0..1.0, 0.0..1.0)?;
    let Some(first) = cells.first() else { return Ok(()) };
    let all = cells.iter().filter(|cell| cell.scenario == first.scenario).enumerate();
    let plotted = |peer: &str| {
        let mut own = cells.iter().filter(|cell| cell.peer == peer && scenarios.contains(&cell.scenario));
        own.any(|cell| !cell.outcomes.is_empty())
    };
    for (column, (nth, cell)) in (0u32..).zip(all.filter(|(_, cell)| plotted(&cell.peer))) {
        let colour = COLOURS[nth % COLOURS.len()];
        let place = 0.02 + 0.19 * f64::from(column);
        chart.draw_series([Rectangle::new([(place, 0.25), (place + 0.012, 0.75)], colour.filled())])?;
        let style = ("sans-serif", 14);
        chart.draw_series([plotters::prelude::Text::new(cell.peer.clone(), (place + 0.018, 0.75), style)])?;
    }
    Ok(())
}

fn unique(cells: &[Cell]) -> Vec<Scenario> {
    let mut scenarios: Vec<Scenario> = Vec::new();
    for cell in cells {
        if !scenarios.contains(&cell.scenario) {
            scenarios.push(cell.scenario);
        }
    }
    scenarios
}

fn draw(path: &Path, size: (u32, u32), action: impl FnOnce(&Panel<'_>) -> Drawn) -> Result<()> {
    let area = SVGBackend::new(path, size).into_drawing_area();
    area.fill(&WHITE).map_err(|error| anyhow!("{error}"))?;
    action(&area).map_err(|error| anyhow!("{error}"))?;
    area.present().map_err(|error| anyhow!("cannot write {}: {error}", path.display()))
}
