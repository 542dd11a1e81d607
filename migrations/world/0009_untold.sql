-- Events of chat turns that have no number yet. A turn leaves them here in its own commit, so that turns do not queue for the
-- head of their project's log; they go into the log together, moments later.

create table untold (
    project_id uuid not null,
    -- From a sequence: a turn that begins after another's commit has the higher one, whatever the clocks say.
    id bigint generated always as identity,
    names text[] not null,
    -- JSON, as it goes out.
    payloads text[] not null,
    at timestamptz not null,
    primary key (project_id, id)
) with (autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_threshold = 500);
