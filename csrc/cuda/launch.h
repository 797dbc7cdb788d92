// What host code knows of a launch. Launchers queue work on `stream` of the current device and return its error, success
// being 0.
#pragma once

namespace igva::cuda {

using Stream = void*;

} // namespace igva::cuda
