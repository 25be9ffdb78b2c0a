//! Plots the blackout and the gap along each axis of the sweep, as SVG.

use std::path::Path;

use anyhow::{Result, anyhow};
use plotters::prelude::{
    BLUE, ChartBuilder, Circle, Color, IntoDrawingArea, IntoLogRange, LineSeries, PathElement, RED, RGBColor,
    SVGBackend, SeriesLabelPosition, WHITE,
};

use super::cell::{Cell, Measured};
use super::numbers::Quantiles;

/// The size of the picture in pixels.
const SIZE: (u32, u32) = (1280, 320);

/// An axis of the sweep: its name, the coordinate of a cell on it, and a function that moves the base cell along it to
/// the coordinate of another cell.
type Axis = (&'static str, fn(&Cell) -> f64, fn(Cell, Cell) -> Cell);

#[expect(clippy::cast_precision_loss, reason = "a coordinate in a picture")]
const AXES: [Axis; 4] = [
    (
        "queue pairs, all busy",
        |cell| f64::from(cell.pairs),
        |base, Cell { pairs, .. }| Cell { pairs, busy: pairs, ..base },
    ),
    (
        "queue pairs, one busy",
        |cell| f64::from(cell.pairs),
        |base, Cell { pairs, .. }| Cell { pairs, ..base },
    ),
    ("guest memory, MiB", |cell| cell.memory as f64, |base, Cell { memory, .. }| Cell { memory, ..base }),
    ("kpps each way", |cell| f64::from(cell.rate) / 1000.0, |base, Cell { rate, .. }| Cell { rate, ..base }),
];

/// A line: its name, its colour and its value for a cell, in microseconds.
type Line = (&'static str, RGBColor, fn(&Measured) -> i64);

const GREY: RGBColor = RGBColor(110, 110, 110);

const LINES: [Line; 3] = [
    ("blackout p50", BLUE, |measured| Quantiles::of(measured.blackouts.iter().copied()).p50),
    ("blackout p99", GREY, |measured| Quantiles::of(measured.blackouts.iter().copied()).p99),
    ("excess gap p50", RED, Measured::excess_gap),
];

/// Draws a panel per axis, with the cells that differ from `base` only along that axis.
///
/// # Errors
/// Returns an error if the file cannot be written.
pub fn draw(path: &Path, base: Cell, cells: &[Measured]) -> Result<()> {
    let area = SVGBackend::new(path, SIZE).into_drawing_area();
    area.fill(&WHITE).map_err(|error| anyhow!("{error}"))?;
    for (panel, (name, place, moved)) in area.split_evenly((1, AXES.len())).iter().zip(AXES) {
        let cells = cells.iter().filter(|measured| moved(base, measured.cell) == measured.cell).collect();
        chart(panel, name, place, cells).map_err(|error| anyhow!("{error}"))?;
    }
    area.present().map_err(|error| anyhow!("cannot write {}: {error}", path.display()))
}

fn chart(
    panel: &plotters::drawing::DrawingArea<SVGBackend<'_>, plotters::coord::Shift>,
    name: &str,
    place: fn(&Cell) -> f64,
    mut cells: Vec<&Measured>,
) -> Result<(), Box<dyn std::error::Error>> {
    cells.sort_by(|one, other| place(&one.cell).total_cmp(&place(&other.cell)));
    let places = cells.iter().map(|measured| place(&measured.cell));
    let (least, most) =
        places.fold((f64::MAX, f64::MIN), |(least, most), place| (least.min(place), most.max(place)));
    #[expect(clippy::cast_precision_loss, reason = "a coordinate in a picture")]
    let value = |line: fn(&Measured) -> i64, measured: &Measured| line(measured).max(1) as f64;
    let values = cells.iter().flat_map(|measured| LINES.map(|(_, _, line)| value(line, measured)));
    let highest = values.fold(100.0_f64, f64::max);
    let mut chart = ChartBuilder::on(panel)
        .margin(10)
        .x_label_area_size(36)
        .y_label_area_size(52)
        .build_cartesian_2d((least / 1.3..most * 1.3).log_scale(), (10.0..highest * 2.0).log_scale())?;
    chart
        .configure_mesh()
        .x_desc(name)
        .y_desc("µs")
        .x_label_formatter(&|value| format!("{value:.0}"))
        .y_label_formatter(&|value| format!("{value:.0}"))
        .light_line_style(WHITE)
        .draw()?;
    for (label, colour, line) in LINES {
        let points: Vec<_> =
            cells.iter().map(|measured| (place(&measured.cell), value(line, measured))).collect();
        chart
            .draw_series(LineSeries::new(points.iter().copied(), colour.stroke_width(2)))?
            .label(label)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 16, y)], colour.stroke_width(2)));
        chart.draw_series(points.iter().map(|point| Circle::new(*point, 3, colour.filled())))?;
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperLeft)
        .background_style(WHITE.mix(0.8))
        .draw()?;
    Ok(())
}
