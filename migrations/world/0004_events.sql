-- What happened to a project, in the order in which it was committed.

-- `last` numbers a project's events. Whoever appends holds this row until the commit, so the order of numbers
-- is the order of commits, and a reader that has seen 7 never misses a late 6.
create table event_heads (
    project_id uuid primary key,
    last bigint not null default 0,
    -- The highest number that was pruned.
    pruned bigint not null default 0
);

create table events (
    project_id uuid not null,
    seq bigint not null,
    name text not null,
    -- JSON, as it goes out.
    payload text not null,
    at timestamptz not null,
    primary key (project_id, seq)
);

create index events_by_time on events (at);
