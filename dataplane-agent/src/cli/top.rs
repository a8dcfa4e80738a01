//! `top`: what goes over Services and Pods now, and what is dropped; on a screen, or once for a script.

mod draw;
pub mod numbers;
mod rates;
mod state;
mod tables;
#[cfg(test)]
mod tests;

use std::{
    io::{self, IsTerminal},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};
use ratatui::crossterm::event::{self, Event, KeyCode, KeyEvent, KeyEventKind, KeyModifiers};
use tokio::signal::unix::{SignalKind, signal};

use self::state::{Top, View};
use super::{
    alone::{self, Places, Said},
    ask::{self, Answer},
    output::{print, table},
};
use crate::load::Load;

/// Between two looks at keys and answers.
const LOOK: Duration = Duration::from_millis(100);
/// An answer may be so much later than its interval before the screen says that there is none.
const LATE: Duration = Duration::from_secs(2);
/// Rows that the page keys move.
const PAGE: isize = 10;

/// Shows what an agent tells each `interval`, or the tables where none runs. `once`, and where nobody looks: after one interval, in plain tables.
pub fn run(places: Places<'_>, interval: Duration, once: bool) -> anyhow::Result<()> {
    // Where neither is there, that is an error here, and no empty screen.
    let (source, first) = Source::find(places)?;
    let mut top = Top::default();
    top.update(first);
    if once || !io::stdout().is_terminal() {
        thread::sleep(interval);
        top.update(source.load()?);
        return print(&plain(&top));
    }
    let answers = ask_again_and_again(source, interval);
    let ended = told_to_end()?;
    let _restored = Screen;
    let mut terminal = ratatui::try_init().context("failed to use this terminal: --once needs none")?;
    let mut answered = Instant::now();
    // Nothing is sorted and drawn for nothing: there may be many rows.
    let mut is_drawn = false;
    while !ended.load(Ordering::Relaxed) {
        for answer in answers.try_iter() {
            is_drawn = false;
            match answer {
                Ok(load) => {
                    answered = Instant::now();
                    top.update(load);
                }
                Err(error) => top.silent(format!("{error:#}")),
            }
        }
        let late = answered.elapsed();
        if top.silence().is_none() && late > interval + LATE {
            top.silent(format!("silent for {} s", late.as_secs()));
            is_drawn = false;
        }
        if !is_drawn {
            terminal
                .draw(|frame| draw::draw(frame, &mut top))
                .context("failed to draw")?;
            is_drawn = true;
        }
        if !event::poll(LOOK).context("failed to wait for keys")? {
            continue;
        }
        // Another size of the terminal is an event too.
        is_drawn = false;
        if let Event::Key(key) = event::read().context("failed to read keys")?
            && key.kind != KeyEventKind::Release
            && !press(&mut top, key)
        {
            break;
        }
    }
    Ok(())
}

/// What an agent has counted, or its tables. `within`: how long the agent may be silent.
pub fn load(places: Places<'_>, within: Duration) -> anyhow::Result<Said<Load>> {
    let Places { socket, bpffs } = places;
    match ask::reach_within(socket, "/load", within).and_then(|answer| of_answer(socket, &answer)) {
        Ok(load) => Ok(Said::by_agent(load)),
        Err(error) => alone::instead(error, || tables::load(bpffs)),
    }
}

/// Gives the terminal back, on whichever way it is left. After a panic a hook of ratatui's does.
struct Screen;

impl Drop for Screen {
    fn drop(&mut self) {
        ratatui::restore();
    }
}

/// Who tells, for as long as the command runs: names do not come and go on the screen.
enum Source {
    Agent(PathBuf),
    /// The BPF file system.
    Tables(PathBuf),
}

impl Source {
    fn find(places: Places<'_>) -> anyhow::Result<(Self, Load)> {
        let said = load(places, ask::WITHIN)?;
        let source = match said.alone {
            None => Self::Agent(places.socket.to_owned()),
            Some(_) => Self::Tables(places.bpffs.to_owned()),
        };
        Ok((source, said.noted()))
    }

    fn load(&self) -> anyhow::Result<Load> {
        match self {
            Self::Agent(socket) => of_answer(socket, &ask::reach(socket, "/load")?),
            Self::Tables(bpffs) => tables::load(bpffs),
        }
    }
}

fn of_answer(socket: &Path, answer: &Answer) -> anyhow::Result<Load> {
    ensure!(
        answer.status != 404,
        "the agent at {} does not count what goes over Services{}",
        socket.display(),
        answer.other_version()
    );
    answer.value()
}

/// Becomes true with a signal that ends the command: by default it would end without giving the terminal back.
fn told_to_end() -> anyhow::Result<Arc<AtomicBool>> {
    let failed = "failed to wait for signals";
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context(failed)?;
    let (mut terminate, mut hangup) = {
        let _entered = runtime.enter();
        let listen = |kind| signal(kind).context(failed);
        (listen(SignalKind::terminate())?, listen(SignalKind::hangup())?)
    };
    let ended = Arc::new(AtomicBool::new(false));
    let end = ended.clone();
    thread::spawn(move || {
        runtime.block_on(async {
            tokio::select! { _ = terminate.recv() => {}, _ = hangup.recv() => {} }
        });
        end.store(true, Ordering::Relaxed);
    });
    Ok(ended)
}

/// Asks in a thread of its own, so that keys work while the agent is slow. It ends with the process.
fn ask_again_and_again(source: Source, interval: Duration) -> mpsc::Receiver<anyhow::Result<Load>> {
    let (answers, taken) = mpsc::sync_channel(1);
    thread::spawn(move || {
        loop {
            thread::sleep(interval);
            if answers.send(source.load()).is_err() {
                return;
            }
        }
    });
    taken
}

/// What a key does; false: it ends the command.
fn press(top: &mut Top, key: KeyEvent) -> bool {
    if key.modifiers.contains(KeyModifiers::CONTROL) {
        return key.code != KeyCode::Char('c');
    }
    if top.is_typing {
        match key.code {
            KeyCode::Char(letter) => top.type_into_filter(letter),
            KeyCode::Backspace => top.erase_from_filter(),
            KeyCode::Enter => top.is_typing = false,
            KeyCode::Esc => {
                top.is_typing = false;
                top.clear_filter();
            }
            KeyCode::Down => top.step(1),
            KeyCode::Up => top.step(-1),
            _ => {}
        }
        return true;
    }
    match key.code {
        KeyCode::Char('q') => return false,
        KeyCode::Esc => return top.back(),
        KeyCode::Tab => top.show_next(1),
        KeyCode::BackTab => top.show_next(View::ALL.len() - 1),
        KeyCode::Char('1') => top.show(View::Services),
        KeyCode::Char('2') => top.show(View::Pods),
        KeyCode::Char('3') => top.show(View::Drops),
        KeyCode::Char('s') => top.sort_by_next(),
        KeyCode::Char('/') => top.is_typing = true,
        KeyCode::Enter => top.open(),
        KeyCode::Char('j') | KeyCode::Down => top.step(1),
        KeyCode::Char('k') | KeyCode::Up => top.step(-1),
        KeyCode::PageDown => top.step(PAGE),
        KeyCode::PageUp => top.step(-PAGE),
        KeyCode::Home => top.step(isize::MIN),
        KeyCode::End => top.step(isize::MAX),
        _ => {}
    }
    true
}

/// The three tables one below the other.
fn plain(top: &Top) -> String {
    let tables = View::ALL.map(|view| {
        let rows = top.rows_of(view);
        table(draw::header_of(view), rows.iter().map(draw::cells))
    });
    tables.concat().trim_start_matches('\n').to_owned()
}
