-- Work that goes on without a request: what is owed, tasks, what their runs came to, and who must say yes.

create table settings (
    project_id uuid primary key,
    body jsonb not null,
    updated_at timestamptz not null default now()
);

create table tasks (
    project_id uuid not null,
    id uuid not null,
    title text not null,
    assign_to text not null,
    status text not null check (status in ('draft', 'pending', 'awaiting_approval', 'assigned', 'in_progress', 'review', 'done', 'failed')),
    -- Paused: stays pending until it is run.
    held boolean not null default false,
    group_label text,
    run_id uuid,
    -- Everything that is not searched for.
    document jsonb not null,
    created_at timestamptz not null,
    updated_at timestamptz not null,
    primary key (project_id, id)
);

create unique index tasks_title_key on tasks (project_id, title) where status not in ('done', 'failed');
create index tasks_by_status on tasks (project_id, status, id);
create index tasks_by_group on tasks (project_id, group_label, id) where group_label is not null;
create index tasks_by_agent on tasks (project_id, assign_to, status, id);

-- What must be done before a task. A needed task that was deleted stays here: it is missing.
create table dependencies (
    project_id uuid not null,
    task_id uuid not null,
    needs_id uuid not null,
    primary key (project_id, task_id, needs_id),
    constraint dependencies_task_fkey foreign key (project_id, task_id) references tasks (project_id, id) on delete cascade
);

create index dependencies_by_need on dependencies (project_id, needs_id);

alter table runs add column task_id uuid;
alter table runs add column started_by bigint;
-- The tool call that may have been begun: intent is on record before a tool runs.
alter table runs add column under_way text;
alter table runs alter column ended_at drop not null;
alter table runs drop constraint runs_status_check;
alter table runs add constraint runs_status_check check (status in ('running', 'finished', 'interrupted', 'failed'));
alter table runs add constraint runs_task_fkey foreign key (project_id, task_id) references tasks (project_id, id) on delete cascade;
create index runs_by_task on runs (project_id, task_id, id) where task_id is not null;

-- What a run has finished, in order: a model's message, a tool's result, a compaction, a reviewer's verdict.
create table steps (
    project_id uuid not null,
    run_id uuid not null,
    number integer not null,
    kind text not null check (kind in ('model', 'tool', 'compaction', 'review')),
    body jsonb not null,
    created_at timestamptz not null,
    primary key (project_id, run_id, number),
    constraint steps_run_fkey foreign key (project_id, run_id) references runs (project_id, id) on delete cascade
);

-- What a model is saying in a step that is not finished, while someone listens. Worth nothing after a crash.
create unlogged table words (
    project_id uuid not null,
    task_id uuid not null,
    run_id uuid not null,
    step integer not null,
    text text not null,
    primary key (project_id, task_id)
);

create sequence leases;

-- The work still owed; what is done has no row here.
--   ready:     it may be claimed.
--   due_at:    when it becomes ready by itself: a timer, or the end of a lease.
--   lease:     a new number with each claim: outcomes are written only while it still matches.
--   holder:    the claiming process' advisory lock: when that is free, the process is gone.
--   parked_on: it waits for a place: of the agent with this name, or of the project ('').
create table jobs (
    project_id uuid not null,
    kind text not null,
    subject uuid not null,
    priority double precision not null default 1,
    ready boolean not null,
    due_at timestamptz not null,
    lease bigint not null default 0,
    holder bigint,
    parked_on text,
    created_at timestamptz not null default clock_timestamp(),
    primary key (project_id, kind, subject)
) with (fillfactor = 50, autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_threshold = 500);

create index jobs_ready on jobs (project_id, priority desc, created_at) where ready;
create index jobs_timed on jobs (due_at) where not ready;
create index jobs_held on jobs (holder) where holder is not null;
create index jobs_parked on jobs (project_id, parked_on) where parked_on is not null;

create table approvals (
    project_id uuid not null,
    id uuid not null,
    task_id uuid,
    gate_id text not null,
    gate_name text not null,
    hook text not null,
    status text not null check (status in ('pending', 'approved', 'rejected', 'timeout')),
    payload jsonb not null,
    timeout_action text not null check (timeout_action in ('approve', 'reject')),
    max_revisions integer not null,
    requested_at timestamptz not null,
    resolved_at timestamptz,
    resolved_by text,
    note text,
    primary key (project_id, id),
    constraint approvals_task_fkey foreign key (project_id, task_id) references tasks (project_id, id) on delete cascade
);

create index approvals_by_task on approvals (project_id, task_id, id);
create index approvals_by_status on approvals (project_id, status, id);
