//! Draws what `top` shows.

use ratatui::{
    Frame,
    layout::{Alignment, Constraint, Layout, Rect},
    style::{Color, Modifier, Style, Stylize},
    text::{Line, Span},
    widgets::{Cell, Paragraph, Row as TableRow, Sparkline, Table},
};

use super::{
    numbers::{rate, size},
    state::{About, Row, Top, View},
};

/// With fewer lines there is no room for a row's past.
const LINES_FOR_PAST: u16 = 12;
const KEYS: &str = "Tab table  s sort  / filter  ↑↓ select  Enter endpoints  q quit";

/// One screen.
pub fn draw(frame: &mut Frame<'_>, top: &mut Top) {
    let past = if frame.area().height < LINES_FOR_PAST {
        0
    } else {
        3
    };
    let [head, tabs, table, past, foot] = Layout::vertical([
        Constraint::Length(1),
        Constraint::Length(1),
        Constraint::Fill(1),
        Constraint::Length(past),
        Constraint::Length(1),
    ])
    .areas(frame.area());
    let rows = top.rows();
    frame.render_widget(totals(top), head);
    frame.render_widget(views(top), tabs);
    draw_rows(frame, table, top, &rows);
    draw_past(frame, past, top, &rows);
    frame.render_widget(last_line(top), foot);
}

fn totals(top: &Top) -> Line<'static> {
    let time = top
        .now()
        .map(|load| load.at.strftime("%H:%M:%S UTC").to_string())
        .unwrap_or_default();
    let text = if top.has_rates() {
        let total = top.total();
        format!(
            "{time}  {} conn/s  {} pkts/s  in {}B/s  out {}B/s  {} drops/s",
            rate(Some(total.connections)),
            rate(Some(total.packets)),
            rate(Some(total.bytes_in)),
            rate(Some(total.bytes_out)),
            rate(Some(total.drops)),
        )
    } else {
        format!("{time}  rates are known after the next answer")
    };
    Line::from(text).bold()
}

fn views(top: &Top) -> Line<'static> {
    let mut spans: Vec<Span<'static>> = Vec::new();
    for (number, view) in View::ALL.into_iter().enumerate() {
        let text = format!(" {} {} ({}) ", number + 1, view.as_str(), top.count(view));
        let is_shown = view == top.view();
        spans.push(if is_shown { text.reversed() } else { text.into() });
    }
    spans.push(format!("  by {}", top.sort().as_str()).into());
    if let Some(opened) = top.opened() {
        spans.push(format!("  {opened}").bold());
    }
    if top.is_typing || !top.filter().is_empty() {
        let cursor = if top.is_typing { "_" } else { "" };
        spans.push(format!("  /{}{cursor}", top.filter()).yellow());
    }
    spans.into()
}

fn draw_rows(frame: &mut Frame<'_>, area: Rect, top: &mut Top, rows: &[Row]) {
    let height = usize::from(area.height.saturating_sub(1));
    let (first, marked) = (top.scroll(rows, height), top.place(rows));
    let shown = rows.iter().enumerate().skip(first).take(height);
    let lines = shown.map(|(place, row)| {
        let cells = cells(row).into_iter().enumerate().map(|(column, text)| {
            let alignment = if is_number(top, column) {
                Alignment::Right
            } else {
                Alignment::Left
            };
            Cell::from(Line::from(text).alignment(alignment))
        });
        let style = if place == marked {
            Style::new().add_modifier(Modifier::REVERSED)
        } else if row.rate.is_some_and(|rate| rate.drops + rate.refused > 0.0) {
            Style::new().fg(Color::Red)
        } else {
            Style::new()
        };
        TableRow::new(cells).style(style)
    });
    let names = header(top).iter().enumerate().map(|(column, name)| {
        let alignment = if is_number(top, column) {
            Alignment::Right
        } else {
            Alignment::Left
        };
        Cell::from(Line::from(*name).alignment(alignment))
    });
    let table =
        Table::new(lines, widths(top)).header(TableRow::new(names).style(Style::new().fg(Color::Cyan)));
    frame.render_widget(table, area);
}

/// The columns of the table that is shown.
pub fn header(top: &Top) -> &'static [&'static str] {
    if top.opened().is_some() {
        return &[
            "ENDPOINT",
            "CONN/s",
            "REFUSED/s",
            "PKTS/s",
            "IN B/s",
            "OUT B/s",
            "STATE",
            "POD",
        ];
    }
    header_of(top.view())
}

pub const fn header_of(view: View) -> &'static [&'static str] {
    match view {
        View::Services => &[
            "SERVICE",
            "CONN/s",
            "REFUSED/s",
            "PKTS/s",
            "IN B/s",
            "OUT B/s",
            "DROPS/s",
            "ENDPOINTS",
        ],
        View::Pods => &[
            "POD",
            "CONN/s",
            "REFUSED/s",
            "PKTS/s",
            "IN B/s",
            "OUT B/s",
            "DROPS/s",
            "HERE",
        ],
        View::Drops => &["REASON", "DROPS/s", "IN ALL"],
    }
}

fn widths(top: &Top) -> Vec<Constraint> {
    let rest: &[u16] = match (top.opened(), top.view()) {
        (Some(_), _) => &[7, 9, 7, 7, 7, 8, 14],
        (None, View::Services) => &[6, 9, 6, 6, 7, 7, 9],
        (None, View::Pods) => &[7, 9, 7, 7, 7, 7, 4],
        (None, View::Drops) => &[9, 12],
    };
    let rest = rest.iter().map(|width| Constraint::Length(*width));
    std::iter::once(Constraint::Fill(1)).chain(rest).collect()
}

fn is_number(top: &Top, column: usize) -> bool {
    let of_rates = match (top.opened(), top.view()) {
        (Some(_), _) => 1..6,
        (None, View::Services | View::Pods) => 1..7,
        (None, View::Drops) => 1..3,
    };
    let of_counts = match (top.opened(), top.view()) {
        (None, View::Services) => 7..8,
        _ => 0..0,
    };
    of_rates.contains(&column) || of_counts.contains(&column)
}

/// A row's texts, as many as its table has columns.
pub fn cells(row: &Row) -> Vec<String> {
    let of = row.rate.as_ref();
    let traffic = [
        rate(of.map(|of| of.connections)),
        rate(of.map(|of| of.refused)),
        rate(of.map(|of| of.packets)),
        rate(of.map(|of| of.bytes_in)),
        rate(of.map(|of| of.bytes_out)),
    ];
    let drops = rate(of.map(|of| of.drops));
    let name = match &row.about {
        // A name without a kind is a Service's.
        About::Service { .. } => row.name.strip_prefix("Service ").unwrap_or(&row.name),
        _ => &row.name,
    };
    let mut cells = vec![name.to_owned()];
    match &row.about {
        About::Service { endpoints } => {
            cells.extend(traffic);
            cells.extend([drops, endpoints.to_string()]);
        }
        About::Endpoint { state, pod } => {
            cells.extend(traffic);
            cells.extend([state.clone(), pod.clone().unwrap_or_default()]);
        }
        About::Pod { here } => {
            cells.extend(traffic);
            cells.extend([drops, if *here { "here" } else { "" }.to_owned()]);
        }
        About::Drops { since_start } => cells.extend([drops, size(*since_start)]),
    }
    cells
}

fn draw_past(frame: &mut Frame<'_>, area: Rect, top: &Top, rows: &[Row]) {
    let row = rows.get(top.place(rows));
    let name = top.opened().or(row.map(|row| row.name.as_str()));
    let Some(name) = name.filter(|_| area.height > 1) else {
        return;
    };
    let past = top.past(row);
    let peak = past.iter().copied().fold(0.0, f64::max);
    let [title, line] = Layout::vertical([Constraint::Length(1), Constraint::Fill(1)]).areas(area);
    let text = format!("{name}: {}, at most {}", top.sort().as_str(), rate(Some(peak)));
    frame.render_widget(Line::from(text).dim(), title);
    // The newest stands at the right end.
    let width = usize::from(line.width);
    let skipped = past.len().saturating_sub(width);
    let mut bars = vec![0; width.saturating_sub(past.len())];
    bars.extend(past[skipped..].iter().map(|value| bar(*value, peak)));
    let bars = Sparkline::default().data(&bars).max(BAR).fg(Color::Green);
    frame.render_widget(bars, line);
}

/// The height of a bar that is a peak.
const BAR: u64 = 1000;

fn bar(value: f64, peak: f64) -> u64 {
    if peak <= 0.0 {
        return 0;
    }
    #[expect(
        clippy::cast_sign_loss,
        clippy::cast_precision_loss,
        reason = "a part of the peak, from 0 to 1"
    )]
    let height = (value / peak * BAR as f64) as u64;
    height.min(BAR)
}

fn last_line(top: &Top) -> Paragraph<'static> {
    match top.silence() {
        Some(reason) => {
            let text = format!("THE AGENT DOES NOT ANSWER, trying again; this is old: {reason}");
            Paragraph::new(text).style(Style::new().fg(Color::White).bg(Color::Red).bold())
        }
        None => Paragraph::new(KEYS).dim(),
    }
}
