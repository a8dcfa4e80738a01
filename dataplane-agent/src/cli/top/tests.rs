//! Keys, pictures and what is drawn of them.

use ratatui::{
    Terminal,
    backend::TestBackend,
    buffer::Buffer,
    style::{Color, Modifier},
};

#[path = "../../../tests/see/canned.rs"]
pub mod canned;

use super::*;
use crate::load::{EndpointLoad, PodLoad, ServiceLoad, Traffic};
use jiff::Timestamp;

fn after(seconds: std::ops::RangeInclusive<u64>) -> Top {
    let mut top = Top::default();
    for second in seconds {
        top.update(canned::load(second));
    }
    top
}

fn names(top: &Top) -> Vec<String> {
    top.rows().into_iter().map(|row| row.name).collect()
}

fn screen(top: &mut Top, width: u16, height: u16) -> Buffer {
    let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
    terminal.draw(|frame| draw::draw(frame, top)).unwrap();
    terminal.backend().buffer().clone()
}

fn lines(buffer: &Buffer) -> Vec<String> {
    let width = usize::from(buffer.area.width).max(1);
    let lines = buffer.content().chunks(width);
    lines
        .map(|line| {
            let text: String = line.iter().map(ratatui::buffer::Cell::symbol).collect();
            text.trim_end().to_owned()
        })
        .collect()
}

fn keys(top: &mut Top, keys: &[KeyCode]) -> bool {
    keys.iter().all(|key| press(top, KeyEvent::from(*key)))
}

#[test]
fn rows_are_sorted_and_keep_their_mark() {
    let mut top = after(0..=1);
    assert_eq!(
        names(&top)[..2],
        ["Service shop/web", "Service kube-system/kube-dns"]
    );
    assert!(keys(&mut top, &[KeyCode::Down]));
    assert_eq!(top.place(&top.rows()), 1);
    assert!(keys(&mut top, &[KeyCode::Char('s')]));
    assert_eq!(names(&top)[..2], ["Service shop/web", "Service shop/db"]);
    let rows = top.rows();
    assert_eq!(rows[top.place(&rows)].name, "Service kube-system/kube-dns");
    assert!(keys(&mut top, &[KeyCode::End, KeyCode::Down, KeyCode::Char('j')]));
    assert_eq!(top.place(&top.rows()), rows.len() - 1);
    assert!(keys(&mut top, &[KeyCode::Home, KeyCode::Up]));
    assert_eq!(top.place(&top.rows()), 0);
}

#[test]
fn a_service_is_opened_and_left_again() {
    let mut top = after(0..=1);
    assert!(keys(&mut top, &[KeyCode::Enter]));
    assert_eq!(names(&top).len(), 4);
    assert!(names(&top).contains(&"10.244.1.12:8080".to_owned()));
    assert!(keys(&mut top, &[KeyCode::Esc]));
    assert_eq!(names(&top).len(), 5);
    assert!(!keys(&mut top, &[KeyCode::Esc]), "nothing to go back from");
    assert!(!keys(&mut after(0..=0), &[KeyCode::Char('q')]));
    let end = KeyEvent::new(KeyCode::Char('c'), KeyModifiers::CONTROL);
    assert!(!press(&mut top, end));
    // One that is gone is not looked into any longer.
    assert!(keys(&mut top, &[KeyCode::Enter]));
    let mut load = canned::load(9);
    load.services.clear();
    top.update(load);
    assert_eq!((top.opened(), top.rows().len()), (None, 0));
    assert!(keys(&mut top, &[KeyCode::Enter, KeyCode::Down]));
}

#[test]
fn a_filter_is_typed_and_cleared() {
    let mut top = after(0..=1);
    let typed = [
        KeyCode::Char('/'),
        KeyCode::Char('q'),
        KeyCode::Backspace,
        KeyCode::Char('d'),
    ];
    assert!(keys(&mut top, &typed));
    assert!(keys(&mut top, &[KeyCode::Char('b'), KeyCode::Enter]));
    assert_eq!(names(&top), ["Service shop/db"]);
    assert!(keys(&mut top, &[KeyCode::Char('2')]));
    assert_eq!(names(&top), ["shop/db-0", "shop/db-1"]);
    assert!(keys(&mut top, &[KeyCode::Esc]));
    assert_eq!(names(&top).len(), 8);
}

#[test]
fn the_past_is_that_of_those_who_move() {
    let mut top = after(0..=3);
    let rows = top.rows();
    assert_eq!(top.past(rows.first()).len(), 3);
    assert!(top.past(rows.last()).is_empty(), "{:?}", rows.last());
    // Long after its last packet a Service has none either.
    let mut load = canned::load(3);
    for second in 4..=4 + state::HISTORY as u64 {
        load.at = canned::load(second).at;
        top.update(load.clone());
    }
    assert!(top.past(top.rows().first()).is_empty());
}

#[test]
fn the_same_answer_twice_changes_nothing() {
    let mut top = after(0..=1);
    let rows = top.rows();
    top.update(canned::load(1));
    assert_eq!(top.rows(), rows);
    top.silent("gone".to_owned());
    assert_eq!(top.rows(), rows, "the last picture stays");
    top.update(canned::load(2));
    assert_eq!(top.silence(), None);
}

/// To write it anew: `UPDATE_DOCS=1 cargo test -p dataplane-agent --lib top::`.
fn is_golden(place: &str, text: &str) {
    let path = format!("{}/{place}", env!("CARGO_MANIFEST_DIR"));
    if std::env::var_os("UPDATE_DOCS").is_some() {
        std::fs::write(&path, text).unwrap();
    }
    assert_eq!(
        std::fs::read_to_string(&path).unwrap_or_default(),
        text,
        "{place} is not what is drawn: UPDATE_DOCS=1 cargo test -p dataplane-agent --lib top::"
    );
}

#[test]
fn three_tables_are_drawn_and_silence_is_told() {
    let mut top = after(0..=30);
    let mut text = String::new();
    for view in View::ALL {
        top.show(view);
        text += &(lines(&screen(&mut top, 80, 24)).join("\n") + "\n----\n");
    }
    assert!(keys(&mut top, &[KeyCode::Char('1'), KeyCode::Enter]));
    top.silent("failed to reach an agent at /run/dataplane/agent.sock".to_owned());
    let buffer = screen(&mut top, 80, 24);
    text += &(lines(&buffer).join("\n") + "\n");
    assert_eq!(buffer[(0, 23)].bg, Color::Red);
    is_golden("tests/golden/top.txt", &text);
}

#[test]
fn the_picture_of_the_documentation_is_what_is_drawn() {
    // A past that rises and falls.
    let (mut top, mut load) = (after(0..=0), canned::load(0));
    for second in 1..=120 {
        let wave = [3, 5, 8, 6, 4, 2, 3, 7, 9, 4][(second / 5 % 10) as usize] + second % 3;
        load.at = canned::load(second).at;
        for (service, base) in load.services.iter_mut().zip(canned::load(1).services) {
            let of_before = canned::load(0);
            let before = of_before
                .services
                .iter()
                .find(|one| one.object == base.object)
                .unwrap()
                .traffic;
            let by = |now: u64, before: u64| (now - before) * wave / 8;
            service.traffic.connections += by(base.traffic.connections, before.connections);
            service.traffic.refused += base.traffic.refused - before.refused;
            service.traffic.dropped += base.traffic.dropped - before.dropped;
            service.traffic.packets_in += by(base.traffic.packets_in, before.packets_in);
            service.traffic.packets_out += by(base.traffic.packets_out, before.packets_out);
            service.traffic.bytes_in += by(base.traffic.bytes_in, before.bytes_in);
            service.traffic.bytes_out += by(base.traffic.bytes_out, before.bytes_out);
        }
        *load.drops.get_mut("policy-denied").unwrap() += 3;
        *load.drops.get_mut("no-endpoints").unwrap() += 2;
        top.update(load.clone());
    }
    is_golden("../docs/images/top.svg", &svg(&screen(&mut top, 90, 20)));
}

#[test]
fn no_terminal_is_too_small() {
    let mut top = after(0..=3);
    for (width, height) in [(1, 1), (3, 2), (10, 3), (20, 5), (5, 40), (200, 1), (80, 12)] {
        for view in View::ALL {
            top.show(view);
            top.open();
            top.step(isize::MAX);
            screen(&mut top, width, height);
        }
    }
    screen(&mut Top::default(), 80, 24);
    let many = (0..100).map(|number| ServiceLoad {
        object: format!("Service ns/s{number:03}"),
        ..ServiceLoad::default()
    });
    top.show(View::Services);
    top.update(Load {
        services: many.collect(),
        at: canned::load(9).at,
        ..Load::default()
    });
    top.step(50);
    let text = lines(&screen(&mut top, 80, 10)).join("\n");
    assert!(text.contains("s050") && !text.contains("s051"), "{text}");
    top.step(-3);
    let text = lines(&screen(&mut top, 80, 10)).join("\n");
    assert!(text.contains("s047") && text.contains("s050"), "{text}");
}

#[test]
fn a_script_gets_plain_tables() {
    let text = plain(&after(0..=1));
    let words: Vec<Vec<&str>> = text
        .lines()
        .map(|line| line.split_whitespace().collect())
        .collect();
    assert_eq!(words[0][..2], ["SERVICE", "CONN/s"], "{text}");
    assert_eq!(
        words[1],
        ["shop/web", "210", "0", "19.2k", "1.8M", "33.0M", "0", "3"]
    );
    let db = ["shop/db-0", "6.0", "0", "480", "20.0k", "155k", "3.0", "here"];
    assert!(words.iter().any(|line| *line == db), "{text}");
    assert!(words.contains(&vec!["policy-denied", "3.0", "10.8k"]), "{text}");
}

/// A screen as a picture: runs of characters of one colour.
fn svg(buffer: &Buffer) -> String {
    use std::fmt::Write as _;

    const WIDE: u32 = 9;
    const HIGH: u32 = 18;
    let (width, height) = (u32::from(buffer.area.width), u32::from(buffer.area.height));
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {} {}\" font-family=\"monospace\" font-size=\"15\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"#14181f\"/>\n",
        width * WIDE + 16,
        height * HIGH + 16,
    );
    for y in 0..buffer.area.height {
        let mut x = 0;
        while x < buffer.area.width {
            let style = (buffer[(x, y)].fg, buffer[(x, y)].modifier);
            let run = (x..buffer.area.width)
                .take_while(|x| (buffer[(*x, y)].fg, buffer[(*x, y)].modifier) == style)
                .count() as u16;
            let text: String = (x..x + run).map(|x| buffer[(x, y)].symbol()).collect();
            let (left, top) = (u32::from(x) * WIDE + 8, u32::from(y) * HIGH + 8);
            let mut fill = match style.0 {
                Color::Green => "#4cc38a",
                Color::Red => "#ff6b6b",
                Color::Cyan => "#56c2d6",
                Color::Yellow => "#e5c07b",
                _ => "#d7dde6",
            };
            if style.1.contains(Modifier::REVERSED) {
                let wide = u32::from(run) * WIDE;
                writeln!(
                    svg,
                    "<rect x=\"{left}\" y=\"{top}\" width=\"{wide}\" height=\"{HIGH}\" fill=\"{fill}\"/>"
                )
                .unwrap();
                fill = "#14181f";
            }
            let weight = if style.1.contains(Modifier::BOLD) {
                " font-weight=\"bold\""
            } else {
                ""
            };
            if !text.trim().is_empty() {
                let text = text.replace('&', "&amp;").replace('<', "&lt;");
                writeln!(
                    svg,
                    "<text x=\"{left}\" y=\"{}\" fill=\"{fill}\"{weight} textLength=\"{}\" xml:space=\"preserve\">{text}</text>",
                    top + 14,
                    u32::from(run) * WIDE,
                )
                .unwrap();
            }
            x += run;
        }
    }
    svg + "</svg>\n"
}
