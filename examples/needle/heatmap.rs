//! Keys found by length and depth, one map for each policy.

use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};
use tokenselect_examples::plot::{DENSE, Drawing, Drawn, FONT, SELECTED};

use crate::retrieval::Retrieval;

const COLUMNS: usize = 4;
const MAP: (u32, u32) = (290, 270);
const TITLE: u32 = 44;

/// A map for each policy.
pub struct HeatMaps<'a> {
    /// Policy by policy, and in each length by length.
    pub policies: &'a [Retrieval],
    /// Lengths of each policy.
    pub num_lengths: usize,
    /// What is said above.
    pub title: String,
}

impl HeatMaps<'_> {
    fn rows(&self) -> usize {
        (self.policies.len() / self.num_lengths.max(1)).div_ceil(COLUMNS).max(1)
    }
}

impl Drawing for HeatMaps<'_> {
    fn size(&self) -> (u32, u32) {
        (MAP.0 * COLUMNS as u32, MAP.1 * self.rows() as u32 + TITLE)
    }

    fn draw<DB: DrawingBackend>(&self, canvas: &DrawingArea<DB, Shift>) -> Drawn<DB> {
        canvas.fill(&WHITE)?;
        let (head, canvas) = canvas.split_vertically(TITLE);
        let middle = Pos::new(HPos::Center, VPos::Center);
        let style = TextStyle::from((FONT, 20).into_font()).pos(middle);
        head.draw(&Text::new(self.title.as_str(), ((self.size().0 / 2) as i32, TITLE as i32 / 2), style))?;
        let panels = canvas.split_evenly((self.rows(), COLUMNS));
        for (panel, of_policy) in panels.iter().zip(self.policies.chunks(self.num_lengths.max(1))) {
            draw_map(panel, of_policy)?;
        }
        if let Some(panel) = panels.get(self.policies.len() / self.num_lengths.max(1)) {
            draw_scale(panel)?;
        }
        Ok(())
    }
}

/// The map of one policy: length to the right, depth downwards.
fn draw_map<DB: DrawingBackend>(panel: &DrawingArea<DB, Shift>, of_policy: &[Retrieval]) -> Drawn<DB> {
    let num_depths = of_policy[0].found.len();
    let mean = of_policy.iter().map(Retrieval::share).sum::<f64>() / of_policy.len() as f64;
    let (columns, rows) = (of_policy.len() as i32, num_depths as i32);
    let caption = format!("{}: {:.0} %", of_policy[0].settings.policy, 100.0 * mean);
    let mut chart = ChartBuilder::on(panel)
        .caption(caption, (FONT, 17))
        .margin(8)
        .x_label_area_size(34)
        .y_label_area_size(48)
        .build_cartesian_2d((0..columns - 1).into_segmented(), (0..rows - 1).into_segmented())?;
    let cells = of_policy.iter().enumerate().flat_map(|(column, retrieval)| {
        retrieval.found.iter().enumerate().map(move |(depth, &found)| {
            let (x, y) = (column as i32, rows - 1 - depth as i32);
            let corners = [
                (SegmentValue::Exact(x), SegmentValue::Exact(y)),
                (SegmentValue::Exact(x + 1), SegmentValue::Exact(y + 1)),
            ];
            Rectangle::new(corners, colour(found as f64 / retrieval.asked as f64).filled())
        })
    });
    let cells: Vec<_> = cells.collect();
    chart.draw_series(cells)?;
    let length = |x: &SegmentValue<i32>| match x {
        SegmentValue::CenterOf(x) => {
            of_policy.get(*x as usize).map_or(String::new(), |retrieval| bytes(retrieval.length))
        }
        _ => String::new(),
    };
    let depth = |y: &SegmentValue<i32>| match y {
        SegmentValue::CenterOf(y) if rows > 1 => format!("{} %", (rows - 1 - y) * 100 / (rows - 1)),
        _ => String::new(),
    };
    chart
        .configure_mesh()
        .disable_mesh()
        .x_labels(of_policy.len())
        .y_labels(num_depths.min(11))
        .x_label_formatter(&length)
        .y_label_formatter(&depth)
        .label_style((FONT, 13))
        .x_desc("bytes")
        .draw()
}

/// What the colours mean.
fn draw_scale<DB: DrawingBackend>(panel: &DrawingArea<DB, Shift>) -> Drawn<DB> {
    const STEPS: i32 = 64;
    let (left, top, width, height) = (60, 70, 180, 18);
    for step in 0..STEPS {
        let share = f64::from(step) / f64::from(STEPS - 1);
        let (from, to) = (left + width * step / STEPS, left + width * (step + 1) / STEPS);
        panel.draw(&Rectangle::new([(from, top), (to, top + height)], colour(share).filled()))?;
    }
    for (text, x) in [("0 %", left), ("100 %", left + width - 24)] {
        panel.draw(&Text::new(text, (x, top + height + 6), (FONT, 14)))?;
    }
    panel.draw(&Text::new("keys found; depth downwards", (left, top - 22), (FONT, 14)))
}

/// From one colour over nearly white to the other.
fn colour(share: f64) -> RGBColor {
    let (from, to, weight) =
        if share < 0.5 { (DENSE, PALE, share * 2.0) } else { (PALE, SELECTED, share * 2.0 - 1.0) };
    let mix = |from: u8, to: u8| (f64::from(from) + (f64::from(to) - f64::from(from)) * weight).round() as u8;
    RGBColor(mix(from.0, to.0), mix(from.1, to.1), mix(from.2, to.2))
}

/// Between found and not found.
const PALE: RGBColor = RGBColor(246, 240, 230);

/// A length in short.
fn bytes(length: usize) -> String {
    match length {
        _ if length.is_multiple_of(1 << 20) => format!("{} M", length >> 20),
        _ if length.is_multiple_of(1 << 10) => format!("{} k", length >> 10),
        _ => length.to_string(),
    }
}
