//! What people and the engine do to missions: each deed one transaction, with its events and the work that follows.
//!
//! Nothing here runs on its own: a mission advances in the very transaction that ends a task of it ([`follow`]), passes
//! a barrier or answers a person. Whoever decides what becomes of a run holds the run's row until the commit, so that two
//! tasks that end at once see each other; and every step asks how things stand and not what was done, so that it may
//! happen twice.

use std::time::Duration;

use chrono::{DateTime, Utc};

use super::{LifecycleError, Result};
use crate::ids::{self, Id};
use crate::mission::{Mission, Status};
use crate::store::{MissionRunRow, ProjectTx, StoreError, until};
use crate::task::Place;

mod advance;
mod define;
mod execute;
mod finish;
mod gate;
mod steer;

pub use advance::{delay_over, tasks_removed};
pub(super) use advance::{follow, is_open};
pub use define::{MissionChange, NewMission, create, edit, update};
pub(super) use execute::{Begun, Occasion, begin_run};
pub use execute::{Execution, execute, launch};
pub use finish::deadline;
pub(super) use gate::{approve, expire, withdraw};
pub use steer::{Resumed, abort, delete, pause, resume, resume_checkpoint};

fn taken(error: StoreError, name: &str) -> LifecycleError {
    if error.is_mission_name_taken() {
        LifecycleError::Conflict(format!(
            "There is a mission \"{name}\" already. Choose another name."
        ))
    } else {
        error.into()
    }
}

fn wrong_state(mission: &Mission, deed: &str) -> LifecycleError {
    LifecycleError::Conflict(format!(
        "A mission that is `{}` cannot be {deed}.",
        mission.status()
    ))
}

/// The newest run of a mission with the mission, both held. Tasks that are to be held must be held before.
async fn hold(tx: &mut ProjectTx, place: Place) -> Result<(MissionRunRow, Mission)> {
    let run = tx.lock_mission_run(place).await?;
    let mission = tx.lock_mission(place.mission).await?;
    if mission.execution_count == place.run {
        Ok((run, mission))
    } else {
        Err(LifecycleError::Conflict(
            "The mission was executed again meanwhile.".to_owned(),
        ))
    }
}

/// The newest run of a mission that has one.
fn newest(mission: &Mission, deed: &str) -> Result<Place> {
    if mission.execution_count == 0 {
        return Err(wrong_state(mission, deed));
    }
    Ok(Place {
        mission: mission.id,
        run: mission.execution_count,
    })
}

/// When a run's deadline is looked at next: at 80 % of its time, then at its end.
fn next_look(
    deadline: DateTime<Utc>,
    started_at: DateTime<Utc>,
    warned: bool,
    now: DateTime<Utc>,
) -> Duration {
    let warning = started_at + (deadline - started_at) * 4 / 5;
    until(if warned { deadline } else { warning }, now)
}

/// Lets a paused mission go on if nothing pauses it any more; else says what still does.
async fn go_on_if_nothing_pauses(
    tx: &mut ProjectTx,
    run: &MissionRunRow,
    mission: &mut Mission,
) -> Result<()> {
    if mission.status() != Status::Paused {
        return Ok(());
    }
    let reached = tx.reached_barriers(run.place).await?;
    let pausing = reached.iter().find(|barrier| barrier.pauses());
    if run.held {
        mission.reason = Some(steer::BY_HAND.to_owned());
    } else if let Some(barrier) = pausing {
        mission.reason = Some(advance::reason(barrier));
    } else {
        mission.go(Status::Active, None)?;
        tx.unpark_mission(mission.id).await?;
    }
    Ok(())
}

/// The mission with this id, as it stands.
async fn read(tx: &mut ProjectTx, id: Id<ids::Mission>) -> Result<Mission> {
    Ok(tx.mission_as_it_stands(id).await?)
}
