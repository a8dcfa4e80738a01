//! `top` and `ui` beside an agent that is not one: a socket that tells the same to everybody.

mod browser;
mod canned;
mod fake;
mod front;
mod top;
mod ui;

use dataplane_agent::load::{EndpointLoad, Load, PodLoad, ServiceLoad, Traffic};
use jiff::Timestamp;
