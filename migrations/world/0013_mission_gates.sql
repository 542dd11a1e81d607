-- Requests that are about a mission and no single task: which, which of its runs, and what the request is to let through.
alter table approvals add column mission_id uuid;
alter table approvals add column mission_run integer;
alter table approvals add column particulars jsonb;
alter table approvals add constraint approvals_mission_fkey
    foreign key (project_id, mission_id) references missions (project_id, id) on delete cascade;
alter table approvals add constraint approvals_subject_check check (task_id is null or mission_id is null);
create index approvals_by_mission on approvals (project_id, mission_id, id) where mission_id is not null;
-- A run that begins or ends looks for those alone that wait.
create index approvals_waiting_by_mission on approvals (project_id, mission_id) where mission_id is not null and status = 'pending';
