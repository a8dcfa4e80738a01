//! What `top` shows: pure state that pictures and keys change, and that is drawn elsewhere.

use std::collections::{HashMap, VecDeque};

use super::rates::{self, Interval, Rate, Rates};
use crate::load::Load;

/// Pictures that the line of a row's past reaches back; at the default interval, three minutes.
pub const HISTORY: usize = 180;
/// No more rows than these have a past.
const REMEMBERED: usize = 4096;

/// A table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum View {
    Services,
    Pods,
    Drops,
}

impl View {
    pub const ALL: [View; 3] = [View::Services, View::Pods, View::Drops];

    pub const fn as_str(self) -> &'static str {
        match self {
            View::Services => "Services",
            View::Pods => "Pods",
            View::Drops => "Drops",
        }
    }

    /// By what its rows can be sorted, what they are sorted by at first in front.
    const fn sorts(self) -> &'static [Sort] {
        match self {
            View::Services | View::Pods => &[
                Sort::Connections,
                Sort::Packets,
                Sort::Bytes,
                Sort::Refused,
                Sort::Drops,
            ],
            View::Drops => &[Sort::Drops],
        }
    }
}

/// A column to sort by; the largest comes first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sort {
    Connections,
    Refused,
    Packets,
    Bytes,
    Drops,
}

impl Sort {
    pub const fn as_str(self) -> &'static str {
        match self {
            Sort::Connections => "connections/s",
            Sort::Refused => "refused/s",
            Sort::Packets => "packets/s",
            Sort::Bytes => "bytes/s",
            Sort::Drops => "drops/s",
        }
    }

    fn of(self, rate: &Rate) -> f64 {
        match self {
            Sort::Connections => rate.connections,
            Sort::Refused => rate.refused,
            Sort::Packets => rate.packets,
            Sort::Bytes => rate.bytes(),
            Sort::Drops => rate.drops,
        }
    }
}

/// A line of a table.
#[derive(Clone, Debug, PartialEq)]
pub struct Row {
    pub name: String,
    /// `None`: not known yet, or counted anew.
    pub rate: Option<Rate>,
    pub about: About,
}

/// What is told of a row beside its rates.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum About {
    Service { endpoints: usize },
    Endpoint { state: String, pod: Option<String> },
    Pod { here: bool },
    Drops { since_start: u64 },
}

/// A row's place in the history: the table, and the row's name.
type Key = (View, String);

/// A view's own state.
#[derive(Clone, Debug)]
struct Choice {
    sort: Sort,
    /// The name of the row, which keeps its mark wherever it moves.
    selected: Option<String>,
}

/// Everything.
#[derive(Clone, Debug)]
pub struct Top {
    before: Option<Load>,
    now: Option<Load>,
    rates: Rates,
    /// Rates of those that had any in the time that it reaches back; those at rest have none.
    history: HashMap<Key, VecDeque<Rate>>,
    view: View,
    choices: [Choice; 3],
    /// The Service whose endpoints are shown.
    opened: Option<String>,
    endpoint: Option<String>,
    filter: String,
    /// Keys go into the filter.
    pub is_typing: bool,
    /// Why the picture is an old one.
    silence: Option<String>,
    /// The first row on the screen.
    first: usize,
}

impl Default for Top {
    fn default() -> Self {
        Self {
            before: None,
            now: None,
            rates: Rates::default(),
            history: HashMap::new(),
            view: View::Services,
            choices: View::ALL.map(|view| Choice {
                sort: view.sorts()[0],
                selected: None,
            }),
            opened: None,
            endpoint: None,
            filter: String::new(),
            is_typing: false,
            silence: None,
            first: 0,
        }
    }
}

/// What happens to it.
impl Top {
    /// The agent has answered.
    pub fn update(&mut self, load: Load) {
        self.silence = None;
        let before = self.now.take();
        if before.as_ref().is_some_and(|before| before.at == load.at) {
            self.now = before;
            return;
        }
        self.rates = before
            .as_ref()
            .map(|before| Rates::between(before, &load))
            .unwrap_or_default();
        if before.is_some() {
            self.remember();
        }
        if let Some(opened) = &self.opened
            && !load.services.iter().any(|service| service.object == *opened)
        {
            self.opened = None;
        }
        self.before = before;
        self.now = Some(load);
    }

    /// The agent does not answer.
    pub fn silent(&mut self, reason: String) {
        self.silence = Some(reason);
    }

    pub fn show(&mut self, view: View) {
        self.view = view;
        self.opened = None;
        self.first = 0;
    }

    pub fn show_next(&mut self, step: usize) {
        let next = (self.view as usize + step) % View::ALL.len();
        self.show(View::ALL[next]);
    }

    pub fn sort_by_next(&mut self) {
        let sorts = self.view.sorts();
        let choice = &mut self.choices[self.view as usize];
        let at = sorts.iter().position(|sort| *sort == choice.sort).unwrap_or(0);
        choice.sort = sorts[(at + 1) % sorts.len()];
    }

    /// Moves the mark so many rows down, or up.
    pub fn step(&mut self, by: isize) {
        let rows = self.rows();
        let Some(last) = rows.len().checked_sub(1) else {
            return;
        };
        let to = self.place(&rows).saturating_add_signed(by).min(last);
        let name = Some(rows[to].name.clone());
        *self.selected_mut() = name;
    }

    /// Shows the endpoints of the Service with the mark.
    pub fn open(&mut self) {
        if self.view == View::Services && self.opened.is_none() {
            let rows = self.rows();
            self.opened = rows.get(self.place(&rows)).map(|row| row.name.clone());
            self.endpoint = None;
            self.first = 0;
        }
    }

    /// Back from endpoints, or from a filter; false: there is nothing to go back from.
    pub fn back(&mut self) -> bool {
        self.first = 0;
        self.opened.take().is_some() || self.clear_filter()
    }

    /// Whether there was one.
    pub fn clear_filter(&mut self) -> bool {
        !std::mem::take(&mut self.filter).is_empty()
    }

    pub fn type_into_filter(&mut self, letter: char) {
        self.filter.push(letter);
    }

    pub fn erase_from_filter(&mut self) {
        self.filter.pop();
    }

    fn selected_mut(&mut self) -> &mut Option<String> {
        match self.opened {
            Some(_) => &mut self.endpoint,
            None => &mut self.choices[self.view as usize].selected,
        }
    }

    fn remember(&mut self) {
        let Rates {
            services,
            pods,
            drops,
            total: _,
        } = &self.rates;
        let mut rates: HashMap<Key, Rate> = HashMap::new();
        for (view, of_view) in View::ALL.into_iter().zip([services, pods, drops]) {
            let moving = of_view.iter().filter(|(_, rate)| !rate.is_zero());
            rates.extend(moving.map(|(name, rate)| ((view, name.clone()), *rate)));
        }
        self.history.retain(|key, past| {
            past.push_back(rates.remove(key).unwrap_or_default());
            if past.len() > HISTORY {
                past.pop_front();
            }
            past.iter().any(|rate| !rate.is_zero())
        });
        let began = rates.into_iter().map(|(key, rate)| (key, VecDeque::from([rate])));
        let room = REMEMBERED.saturating_sub(self.history.len());
        self.history.extend(began.take(room));
    }
}

/// What is to be seen.
impl Top {
    pub fn now(&self) -> Option<&Load> {
        self.now.as_ref()
    }

    /// Rates are known.
    pub fn has_rates(&self) -> bool {
        self.before.is_some()
    }

    pub fn total(&self) -> &Rate {
        &self.rates.total
    }

    pub fn view(&self) -> View {
        self.view
    }

    pub fn opened(&self) -> Option<&str> {
        self.opened.as_deref()
    }

    pub fn sort(&self) -> Sort {
        self.choices[self.view as usize].sort
    }

    pub fn filter(&self) -> &str {
        &self.filter
    }

    pub fn silence(&self) -> Option<&str> {
        self.silence.as_deref()
    }

    /// How many rows a table has without a filter.
    pub fn count(&self, view: View) -> usize {
        self.now.as_ref().map_or(0, |load| match view {
            View::Services => load.services.len(),
            View::Pods => load.pods.len(),
            View::Drops => load.drops.len(),
        })
    }

    /// The rows of the table that is shown.
    pub fn rows(&self) -> Vec<Row> {
        match &self.opened {
            Some(service) => self.endpoints(service),
            None => self.rows_of(self.view),
        }
    }

    /// The rows of a table, sorted, that the filter lets through.
    pub fn rows_of(&self, view: View) -> Vec<Row> {
        let Some(load) = &self.now else {
            return Vec::new();
        };
        let row = |name: &str, rates: &HashMap<String, Rate>, about| Row {
            name: name.to_owned(),
            rate: rates.get(name).copied(),
            about,
        };
        let is_wanted = |name: &str| self.filter.is_empty() || name.contains(&self.filter);
        let mut rows: Vec<Row> = match view {
            View::Services => {
                let services = load.services.iter().filter(|service| is_wanted(&service.object));
                services
                    .map(|service| {
                        let about = About::Service {
                            endpoints: service.endpoints.iter().filter(|one| one.is_active()).count(),
                        };
                        row(&service.object, &self.rates.services, about)
                    })
                    .collect()
            }
            View::Pods => {
                let pods = load.pods.iter().filter(|pod| is_wanted(&pod.pod));
                pods.map(|pod| row(&pod.pod, &self.rates.pods, About::Pod { here: pod.here }))
                    .collect()
            }
            View::Drops => {
                let drops = load.drops.iter().filter(|(reason, _)| is_wanted(reason));
                drops
                    .map(|(reason, number)| {
                        let about = About::Drops { since_start: *number };
                        row(reason, &self.rates.drops, about)
                    })
                    .collect()
            }
        };
        sort(&mut rows, self.choices[view as usize].sort);
        rows
    }

    fn endpoints(&self, service: &str) -> Vec<Row> {
        let of = |load: Option<&'_ Load>| {
            let service = load?.services.iter().find(|one| one.object == service)?;
            Some(service.endpoints.clone())
        };
        let (before, now) = (self.before.as_ref(), self.now.as_ref());
        let interval = before
            .zip(now)
            .and_then(|(before, now)| Interval::between(before, now));
        let (before, now) = (of(before).unwrap_or_default(), of(now).unwrap_or_default());
        let mut rows: Vec<Row> = rates::of_endpoints(&before, &now, interval)
            .into_iter()
            .map(|(name, rate, endpoint)| Row {
                name,
                rate,
                about: About::Endpoint {
                    state: endpoint.state.clone(),
                    pod: endpoint.pod.clone(),
                },
            })
            .collect();
        sort(&mut rows, self.sort());
        rows
    }

    /// Where the mark is among the rows.
    pub fn place(&self, rows: &[Row]) -> usize {
        let selected = match self.opened {
            Some(_) => &self.endpoint,
            None => &self.choices[self.view as usize].selected,
        };
        let place = selected
            .as_ref()
            .and_then(|name| rows.iter().position(|row| row.name == *name));
        place.unwrap_or(0)
    }

    /// The first row on a screen of so many, on which the mark has to be.
    pub fn scroll(&mut self, rows: &[Row], height: usize) -> usize {
        let place = self.place(rows);
        let lowest = (place + 1).saturating_sub(height);
        let highest = place.min(rows.len().saturating_sub(height));
        self.first = self.first.clamp(lowest, highest.max(lowest));
        self.first
    }

    /// The past of a row in the column that is sorted by, its newest value last. Of endpoints it is their Service's.
    pub fn past(&self, row: Option<&Row>) -> Vec<f64> {
        let name = match &self.opened {
            Some(service) => Some(service),
            None => row.map(|row| &row.name),
        };
        let past = name.and_then(|name| self.history.get(&(self.view, name.clone())));
        past.into_iter()
            .flatten()
            .map(|rate| self.sort().of(rate))
            .collect()
    }
}

/// The largest first, then by name.
fn sort(rows: &mut [Row], by: Sort) {
    let value = |row: &Row| row.rate.as_ref().map_or(-1.0, |rate| by.of(rate));
    rows.sort_by(|a, b| value(b).total_cmp(&value(a)).then_with(|| a.name.cmp(&b.name)));
}
